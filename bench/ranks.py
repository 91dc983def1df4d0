"""What several processes cost and come to: seconds, memory and bytes exchanged against their number; equal results.

    python bench/ranks.py [--networks resnet20_digits vit_digits resnet20] [--ranks 1 2 3] [--types float32 float64]

The digits networks on their own images; `resnet20` is that for CIFAR-10 with random weights on random images. Each job
is run by torchrun's module with so many processes of one thread each, and twice without (`ranks` 0): with one thread,
with which the others are compared, and with two, which add floats up in another order too. Bytes are those that a
process hands to the exchanges; each sends 2 (N - 1) / N times that.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, Parser, Results
from resnet_cifar import ResNet
from safetensors.torch import load_file, save_file
from vit_small import vit_digits

import snows
from snows.cli.shell import shell
from snows.distributed import current
from snows.errors import SnowsError
from snows.memory import forget_peak, peak_memory
from snows.zoo import images as data
from snows.zoo.classifiers import load_checkpoint

NETWORKS = {"resnet20_digits": lambda: ResNet(20, 10, channels=1), "vit_digits": vit_digits}
PATTERNS = {"resnet20_digits": snows.Unstructured(0.8), "vit_digits": snows.NM(2, 4), "resnet20": snows.NM(1, 4)}


def problem(network: str, images: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network and its calibration images."""
    torch.manual_seed(0)
    if network == "resnet20":
        return ResNet(20, 10), torch.randn(images, 3, 32, 32)
    model, train = NETWORKS[network](), data.load("digits", data.normalised((0.5,), (0.5,)), Path())
    load_checkpoint(model, ROOT / "checkpoints" / f"{network}.safetensors")
    return model, train.calibration(images, 0)[0]


def work(job: dict, out: Path) -> None:
    """One process of a job; the first writes what came of it."""
    if job["ranks"]:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(job["threads"])
    model, images = problem(job["network"], job["images"])
    dtype, group = getattr(torch, job["dtype"]), current()
    options = snows.Options(schedule=job["schedule"], joint_steps=job["joint_steps"])
    forget_peak("cpu")
    pruned = snows.prune(model.to(dtype), images.to(dtype), PATTERNS[job["network"]], options)
    peak, moved = -group.least(-peak_memory("cpu")), dict(group.moved)
    if group.rank == 0:
        state = {name: tensor.contiguous() for name, tensor in pruned.model.state_dict().items()}
        save_file(state, out / "model.safetensors")
        save_file(pruned.masks, out / "masks.safetensors")
        record = {
            "seconds": pruned.seconds,
            "products": pruned.curvature_products,
            "peak_memory_bytes": peak,
            "parameters": sum(mask.numel() for mask in pruned.masks.values()),
            "iterations": [record.cg_iterations for record in pruned.layers],
            **{name.replace(" ", "_").replace("-", "_"): count for name, count in moved.items()},
        }
        (out / "record.json").write_text(json.dumps(record))


def run(job: dict, out: Path) -> dict:
    """A job in processes of its own; its record."""
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(job["ranks"])] if job["ranks"] else []
    command = [sys.executable, *launcher, __file__, "--work", json.dumps(job), str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])}, capture_output=True, text=True
    )
    if done.returncode:
        raise SnowsError(f"{job}: its run failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((out / "record.json").read_text())


def compared(out: Path, reference: Path) -> dict:
    """How far a job's weights are from those of one process, relative, and whether its masks are the same."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, reference))
    masks, others = (load_file(folder / "masks.safetensors") for folder in (out, reference))
    moved = [name for name in ours if ours[name].is_floating_point()]
    far = [((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-30)).item() for name in moved]
    return {"difference": max(far), "same_masks": all(masks[name].equal(others[name]) for name in masks)}


def main():
    parser = Parser(__doc__, "ranks.csv")
    parser.add_argument("--networks", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of processes")
    parser.add_argument("--types", nargs="+", default=["float32", "float64"], choices=("float32", "float64"))
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument("--schedule", type=int, default=2, help="as of the scripts (default: %(default)s)")
    parser.add_argument("--joint_steps", type=int, default=4, help="as of the scripts (default: %(default)s)")
    args = parser.parse()
    results = Results(args.out)
    for network in args.networks:
        for dtype in args.types:
            common = {"network": network, "dtype": dtype, "images": args.images}
            common |= {"schedule": args.schedule, "joint_steps": args.joint_steps}
            jobs = [{**common, "ranks": a, "threads": b} for a, b in [(0, 1), (0, 2), *((n, 1) for n in args.ranks)]]
            if not results.missing(jobs):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = []
                for place, job in enumerate(jobs):
                    out = Path(folder, str(place))
                    record = run(job, out)
                    found.append(record.pop("iterations"))
                    row = {**job, **record, "same_iterations": found[-1] == found[0]}
                    row |= compared(out, Path(folder, "0"))
                    if results.missing([job]):
                        results.add(row)
                    print(
                        f"{network}, {dtype}, {job['ranks']}, {job['threads']}: {record['seconds']:.0f} s", flush=True
                    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        shell(main)
