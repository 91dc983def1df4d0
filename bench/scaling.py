"""How time and memory grow with the calibration images, with K and with the network: slopes on a log-log scale.

    python bench/scaling.py [--device cuda] [--out FILE]

ResNets of section 4.2 of He et al. with random weights on random 32 x 32 images, 1:4, one pass layer by layer, each
run in a process of its own. A slope of 1 is linear, of 0 constant. Writes {"machine": ..., "slopes": ..., "rows":
[...]} and a plot.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning")]

from resnet_cifar import ResNet  # noqa: E402

import snows  # noqa: E402
from snows.cli import run_folder  # noqa: E402
from snows.cli.shell import shell  # noqa: E402

START = {"images": 128, "k_step": 4, "depth": 20}
VALUES = {"images": (64, 128, 256, 512), "k_step": (0, 1, 2, 4, 8, 16), "depth": (8, 14, 20, 32, 56)}


def measure(images: int, k_step: int, depth: int, device: str) -> dict:
    """One run."""
    torch.manual_seed(0)
    model, calibration = ResNet(depth, 10), torch.randn(images, 3, 32, 32)
    options = snows.Options(k_step=k_step, schedule=0, joint_steps=0, batch_size=64)
    pruned = snows.prune(model, calibration, snows.NM(1, 4), options, device=device)
    return {
        "seconds": pruned.seconds,
        "products": pruned.curvature_products,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": pruned.peak_memory_bytes,
    }


def slopes(rows: list[dict]) -> dict:
    """For each varied quantity, the exponent of seconds and of peak memory (K = 0 left out)."""
    result = {}
    for name in VALUES:
        chosen = [row for row in rows if row["varied"] == name and row[name] > 0]
        x = np.log([row[name] for row in chosen])
        fits = {y: np.polyfit(x, np.log([row[y] for row in chosen]), 1)[0] for y in ("seconds", "peak_memory_bytes")}
        result[name] = {y: round(float(slope), 3) for y, slope in fits.items()}
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Seconds and peak memory over each varied quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(VALUES), figsize=(4 * len(VALUES), 6), layout="constrained")
    for column, name in enumerate(VALUES):
        chosen = [row for row in rows if row["varied"] == name]
        for axes, y, unit in zip(panels[:, column], ("seconds", "peak_memory_bytes"), (1, 2**30)):
            axes.plot([row[name] for row in chosen], [row[y] / unit for row in chosen], "o-")
            axes.set_ylim(bottom=0)
            axes.set_xlabel(name)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("peak memory, GiB")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "scaling.json")
    parser.add_argument("--one", type=int, nargs=3, metavar=tuple(START), help="one run, its figures printed as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.device)))
        return
    rows = []
    for name, values in VALUES.items():
        for value in values:
            point = {**START, name: value}
            command = [sys.executable, __file__, "--device", args.device, "--one", *map(str, point.values())]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"varied": name, **point, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    environment = run_folder.environment(args.device)
    record = {"machine": environment["machine"], "environment": environment, "slopes": slopes(rows), "rows": rows}
    run_folder.write_json(args.out, record)
    plot(rows, args.out.with_suffix(".svg"))
    print(record["slopes"])


if __name__ == "__main__":
    shell(main)
