"""What a GPU makes of the same jobs: seconds, peak memory, the share of copies, and how near a product is to its peak.

    python bench/gpu.py [--checkpoint resnet20_cifar10.pt --dset cifar10.npz] [--device cuda] [--out FILE]

bench/gpu.sh runs it with the data beside the checkout. Jobs: the ResNet-20 of the README's first command at full size
(needs --checkpoint and --dset, else left out); a ViT-B/16 at 2:4, K = 3, 256 images, and a ResNet-50 at 2:4, both with
random weights on random images, the latter once more with a small memory budget; one curvature product beside a large
matrix product; and a small job on the CPU and on the device. Each row names its job, and leaves the figures of other
jobs empty.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from common import Parser, Results
from resnet_cifar import ResNet
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import snows
from snows import memory
from snows.calibration.streams import Streams
from snows.cli.shell import shell
from snows.modes import precision
from snows.network.network import Network
from snows.solve.curvature import Curvature
from snows.solve.objective import reconstruction
from snows.zoo.classifiers import load_checkpoint


def wait(device: str) -> None:
    if memory.is_gpu(device):
        torch.cuda.synchronize(device)


def copies(profiler: profile) -> float | None:
    """The share of the device's busy time that copies between it and the host take; None without a GPU."""
    events = [event for event in profiler.key_averages() if event.device_type is not torch.autograd.DeviceType.CPU]
    busy = sum(event.self_device_time_total for event in events)
    between = sum(e.self_device_time_total for e in events if "HtoD" in e.key or "DtoH" in e.key)
    return between / busy if busy else None


def job(model, images, pattern, options, device: str) -> list[dict]:
    """A whole job: seconds, peak memory and products; and of one more like it, on few images, the share of copies."""
    pruned = snows.prune(model, images, pattern, options, device=device)
    with profile(activities=[ProfilerActivity.CUDA if memory.is_gpu(device) else ProfilerActivity.CPU]) as profiler:
        snows.prune(model, images[: len(images) // 4], pattern, options.but(schedule=0, joint_steps=0), device=device)
    row = {
        "images": len(images),
        "seconds": pruned.seconds,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "products": pruned.curvature_products,
        "micro_batches": sorted({layer.batch_size for layer in pruned.layers}),
        "share_of_copies": copies(profiler),
        "problems": "; ".join(f"{layer}: {reason}" for layer, reason in pruned.problems.items()),
        "options": vars(options),
    }
    return [row]


def cifar(args: argparse.Namespace) -> list[dict]:
    """0.7 unstructured, K = 20, 3,000 images, Newton steps on mini-batches of 512: the command users have."""
    model = ResNet(20, 10)
    load_checkpoint(model, args.checkpoint)
    images = torch.from_numpy(np.load(args.dset)["x_train"][: min(3000, 12 * args.scale)])
    images = images.permute(0, 3, 1, 2) / 127.5 - 1
    options = snows.Options(k_step=20, batch_size=512, batching=True)
    return job(model, images, snows.Unstructured(0.7, 0.8), options, args.device)


def vit(args: argparse.Namespace) -> list[dict]:
    options = snows.Options(k_step=3, batch_size=128)
    return job(network("vit_b_16"), images_for(args), snows.NM(2, 4), options, args.device)


def resnet50(args: argparse.Namespace) -> list[dict]:
    return job(network("resnet50"), images_for(args), snows.NM(2, 4), snows.Options(), args.device)


def staged(args: argparse.Namespace) -> list[dict]:
    """The ResNet-50 with a budget for a fraction of its features: what copies by way of the host cost."""
    options = snows.Options(memory_budget=args.budget)
    return job(network("resnet50"), images_for(args), snows.NM(2, 4), options, args.device)


def network(name: str):
    torch.manual_seed(0)
    return torchvision.models.get_model(name)


def images_for(args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(args.scale, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def rate(work: Callable[[], object], device: str, times: int = 5) -> float:
    """TFLOP/s of some work, the best of several times."""
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return counter.get_total_flops() / min(seconds) / 1e12


def product(args: argparse.Namespace) -> list[dict]:
    """A curvature product of a ViT-B/16's first MLP, on one micro-batch, beside a product of two matrices."""
    images = images_for(args)[: max(1, args.scale // 8)]
    streams = Streams(Network(network("vit_b_16"), args.device), [images], args.device)
    layer = next(each for each in streams.network.layers if each.name.endswith("layer_0.mlp.0"))
    streams.advance(layer)
    objective = reconstruction([layer], streams.sparse, streams.dense, snows.Options(k_step=3))
    theta = objective.variables.pack([streams.network.model.get_parameter(layer.parameter)])
    here, vector, rows = Curvature(objective, theta), torch.ones_like(theta), []
    matrix = torch.randn(args.matrix, args.matrix, device=args.device)
    for name in ("highest", "tf32"):
        with precision(name):
            row = {"precision": name, "product_tflops": rate(lambda: here.matvec(vector), args.device)}
            rows.append({**row, "matrix_tflops": rate(lambda: matrix @ matrix, args.device)})
    return rows


def against_cpu(args: argparse.Namespace) -> list[dict]:
    """The same small job on the CPU and on the device: seconds, and how far the networks they give are apart."""
    torch.manual_seed(0)
    model, images = ResNet(20, 10), torch.randn(args.scale, 3, 32, 32)
    jobs = {}
    for place in dict.fromkeys(("cpu", args.device)):
        options = snows.Options(precision="highest")
        jobs[place] = snows.prune(model, images, snows.NM(1, 4), options, device=place)
    with torch.no_grad():
        dense = model.eval()(images)
        logits = {place: found.model.eval()(images) for place, found in jobs.items()}
    reference = jobs["cpu"]
    return [
        {
            "place": place,
            "images": len(images),
            "seconds": found.seconds,
            "same_masks": all(mask.equal(reference.masks[name]) for name, mask in found.masks.items()),
            "relative_difference_of_logits": relative(logits[place], logits["cpu"]),
            "relative_error": relative(logits[place], dense),
        }
        for place, found in jobs.items()
    ]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far tensors are apart, relative to the second."""
    return ((found - expected).norm() / expected.norm()).item()


JOBS = {"cifar": cifar, "vit_b_16": vit, "resnet50": resnet50, "staged": staged}
JOBS |= {"product": product, "against_cpu": against_cpu}


def main():
    parser = Parser(__doc__, "gpu.csv", "--device")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--checkpoint", type=Path, help="weights of the ResNet-20")
    parser.add_argument("--dset", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--scale", type=int, default=256, help="images of the ImageNet jobs (default: 256)")
    parser.add_argument("--budget", type=float, default=6, help="GiB of the job named staged (default: 6)")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices (default: 8192)")
    parser.set_defaults(device="cuda")
    args = parser.parse()
    snows.arguments.check_device(args.device)
    results, rows = Results(args.out, args.device), []
    for name in args.jobs:
        if name == "cifar" and not (args.checkpoint and args.dset):
            print("cifar: left out, it needs --checkpoint and --dset")
            continue
        found = [{"job": name, **row} for row in JOBS[name](args)]
        print(*found, sep="\n", flush=True)
        rows += found
        results.replace(rows)


if __name__ == "__main__":
    shell(main)
