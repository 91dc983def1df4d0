"""What keeping every finished layer costs: seconds of writing as a share of the run that they belong to.

    python bench/checkpointing.py [--device cuda] [--folder DIR] [--out FILE]

The ResNet-20 that ships (8 x 8 grey), one for 32 x 32 colour images, and torchvision's ViT-B/16 with random weights, of
which the first block is pruned; random images where none ship. Each step is timed inside the one run that writes it, to
the disk that holds --folder. One row per network.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from common import ROOT, Parser, Results
from resnet_cifar import ResNet
from torch import Tensor, nn

import snows
from snows.cli.journal import Journal
from snows.cli.shell import shell
from snows.job import Job
from snows.zoo import images as data
from snows.zoo.classifiers import load_checkpoint

ANY = lambda name: True  # noqa: E731


def digits() -> tuple[nn.Module, Tensor, dict]:
    """The run without flags, with fewer images."""
    model = ResNet(20, 10, channels=1)
    load_checkpoint(model, ROOT / "checkpoints" / "resnet20_digits.safetensors")
    images, _ = data.load("digits", data.normalised((0.5,), (0.5,)), Path()).calibration(512, 0)
    return model, images, dict(pattern=snows.Unstructured(0.8), options=snows.Options(), layers=ANY)


def cifar() -> tuple[nn.Module, Tensor, dict]:
    """The shape of CIFAR-10."""
    options = snows.Options(sweeps=1, schedule=0)
    return ResNet(20, 10), torch.randn(64, 3, 32, 32), dict(pattern=snows.NM(1, 4), options=options, layers=ANY)


def vit() -> tuple[nn.Module, Tensor, dict]:
    """One block of ViT-B/16: the smallest share of work per written weight that its flags give."""
    options = snows.Options(sweeps=1, schedule=0, k_step=3, batch_size=8)
    chosen = lambda name: "encoder_layer_0." in name  # noqa: E731
    return (
        torchvision.models.vit_b_16(),
        torch.randn(16, 3, 224, 224),
        dict(pattern=snows.NM(2, 4), options=options, layers=chosen),
    )


RUNS = {"resnet20_digits": digits, "resnet20, 32 x 32": cifar, "vit_b_16, first block": vit}


def measure(build: Callable, folder: Path, device: str) -> dict:
    """One run, every finished layer written as a script's run writes it."""
    torch.manual_seed(0)
    model, images, job = build()
    journal, seconds = Journal(folder), []

    def keep(step: snows.result.Step, job: Job) -> None:
        started = time.perf_counter()
        journal.append(step)
        seconds.append(time.perf_counter() - started)

    pruned = snows.prune(model, images, device=device, listener=keep, **job)
    size = sum(file.stat().st_size for file in journal.folder.iterdir())
    return {
        "images": len(images),
        "seed": job["options"].seed,
        "options": {name: value for name, value in vars(job["options"]).items() if name != "seed"},
        "steps": len(seconds),
        "bytes_written": size,
        "writing_seconds": sum(seconds),
        "run_seconds": pruned.seconds,
        "share": sum(seconds) / pruned.seconds,
    }


def main():
    parser = Parser(__doc__, "checkpointing.csv", "--device")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where the steps are written for the time of a run")
    args = parser.parse()
    results, rows = Results(args.out, args.device), []
    for name, build in RUNS.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append({"network": name, **measure(build, Path(folder), args.device)})
        print(f"{name}: {rows[-1]['share']:.2%} of {rows[-1]['run_seconds']:.0f} s", flush=True)
    results.replace(rows)


if __name__ == "__main__":
    shell(main)
