"""How time and memory grow with the calibration images, with K and with the network: slopes on a log-log scale.

    python bench/scaling.py [--device cuda] [--out FILE]

ResNets of section 4.2 of He et al. with random weights on random 32 x 32 images, 1:4, one pass layer by layer, each
run in a process of its own. One row per run, and a plot; in a second file, NAME_slopes.csv, the slopes: 1 is linear, 0
constant.
"""

import json

import numpy as np
import torch
from common import Parser, Results, one_run, panels, save_figure, write
from resnet_cifar import ResNet

import snows
from snows.cli.shell import shell
from snows.errors import SnowsError

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


def slopes(rows: list[dict]) -> list[dict]:
    """For each varied quantity, the exponent of seconds and of peak memory (K = 0 left out)."""
    result = []
    for name in VALUES:
        chosen = [row for row in rows if row["varied"] == name and row[name] > 0]
        x = np.log([row[name] for row in chosen])
        fits = {y: np.polyfit(x, np.log([row[y] for row in chosen]), 1)[0] for y in ("seconds", "peak_memory_bytes")}
        result.append({"varied": name, **{y: round(float(slope), 3) for y, slope in fits.items()}})
    return result


def plot(rows: list[dict]):
    """Seconds and peak memory over each varied quantity."""
    figure, axes = panels(2, len(VALUES), 4 * len(VALUES), 6)
    for column, name in enumerate(VALUES):
        chosen = [row for row in rows if row["varied"] == name]
        for panel, y, unit in zip(axes[:, column], ("seconds", "peak_memory_bytes"), (1, 2**30)):
            panel.plot([row[name] for row in chosen], [row[y] / unit for row in chosen], "o-")
            panel.set_ylim(bottom=0)
            panel.set_xlabel(name)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GiB")
    return figure


def main():
    parser = Parser(__doc__, "scaling.csv", "--device")
    parser.add_argument("--one", type=int, nargs=3, metavar=tuple(START), help="one run, its figures printed as JSON")
    args = parser.parse()
    if args.one:
        print(json.dumps(measure(*args.one, args.device)))
        return
    results, rows = Results(args.out, args.device), []
    for name, values in VALUES.items():
        for value in values:
            point = {**START, name: value}
            figures = one_run(__file__, "--one", *point.values(), "--device", args.device)
            if "failed" in figures:
                raise SnowsError(f"{point}: {figures['failed']}")
            rows.append({"varied": name, **point, **figures})
            print(rows[-1], flush=True)
    results.replace(rows)
    write(args.out.with_name(f"{args.out.stem}_slopes.csv"), slopes(rows))
    save_figure(plot(rows), args.out)
    print(*slopes(rows), sep="\n")


if __name__ == "__main__":
    shell(main)
