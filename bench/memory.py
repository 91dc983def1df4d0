"""How much of the host's memory a job takes, by its calibration images, with a budget and without.

    python bench/memory.py [--jobs resnet50-k30 ...] [--images 16 32 64] [--budgets 0 8] [--out FILE]

Networks with random weights on random images of 224 x 224 pixels, pruned 2:4. The layers that take most are the first
ones, and the joint steps take all the layers at once: these are run, with one curvature product each, every run in a
process of its own. What counts is anonymous memory (RssAnon), sampled every few milliseconds; pages of mapped files
are the system's cache. Rows are added to the results file, each with the commit that it was measured at.
"""

import itertools
import json
import subprocess
import threading
import time
import zlib
from pathlib import Path

import torch
import torchvision
from common import ROOT, Parser, Results, one_run

import snows
from snows.cli.shell import shell
from snows.result import Step

FIRST = ("layer1.0.conv1", "layer1.0.conv2")
BLOCK = tuple(f"encoder.layers.encoder_layer_0.{name}" for name in ("self_attention.in_proj", "mlp.0"))
# name -> (network, K, the layers to solve; None: all of them, in a joint step)
JOBS = {
    "resnet50-k30": ("resnet50", 30, FIRST),
    "resnet50-k4": ("resnet50", 4, FIRST),
    "resnet50-joint": ("resnet50", 0, None),
    "vit_b_16-k3": ("vit_b_16", 3, BLOCK),
    "vit_b_16-joint": ("vit_b_16", 0, None),
}
OPTIONS = dict(schedule=0, max_CG_iterations=1, joint_CG_iterations=1)


class Peak(threading.Thread):
    """The most anonymous memory that this process had while the thread ran."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.going = 0, True

    def run(self):
        while self.going:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
            time.sleep(0.005)


def masked(model, images: int) -> list[Step]:
    """Every layer as its mask leaves it, as steps that are finished: what is left to do is the joint step."""
    pruned = snows.prune(model, None, snows.NM(2, 4), algo="MP")
    parameters = dict(pruned.model.named_parameters())
    steps = []
    for layer in pruned.layers:
        weight = next(
            parameters[name] for name in (f"{layer.name}.weight", f"{layer.name}_weight") if name in parameters
        )
        layer.batch_size = images
        steps.append(Step(layer, pruned.masks[layer.name], weight.detach()))
    return steps


def measure(job: str, images: int, budget: float) -> dict:
    """One run, in this process."""
    name, k_step, chosen = JOBS[job]
    torch.manual_seed(0)
    model, calibration = torchvision.models.get_model(name), torch.randn(images, 3, 224, 224)
    options = snows.Options(**OPTIONS, k_step=k_step, joint_steps=int(chosen is None), memory_budget=budget)
    layers = (lambda layer: layer in chosen) if chosen else (lambda layer: True)
    finished = [] if chosen else masked(model, images)
    peak = Peak()
    peak.start()
    pruned = snows.prune(model, calibration, snows.NM(2, 4), options, layers=layers, finished=finished)
    peak.going = False
    weights = b"".join(p.detach().numpy().tobytes() for p in pruned.model.parameters())
    return {
        "peak_bytes": peak.bytes,
        "seconds": pruned.seconds,
        "products": pruned.curvature_products,
        "micro_batch": pruned.layers[-1].batch_size,
        "weights": f"{zlib.crc32(weights):08x}",
        "problems": "; ".join(f"{layer}: {reason}" for layer, reason in pruned.problems.items()),
    }


def main():
    parser = Parser(__doc__, "memory.csv")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0, 8], help="GiB; 0: none (default: 0 8)")
    parser.add_argument("--one", action="store_true", help="a single run in this process, its figures printed as JSON")
    args = parser.parse()
    if args.one:
        print(json.dumps(measure(args.jobs[0], args.images[0], args.budgets[0])))
        return
    results = Results(args.out)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for job, images, budget in itertools.product(args.jobs, args.images, args.budgets):
        found = one_run(__file__, "--one", "--jobs", job, "--images", images, "--budgets", budget)
        row = {"commit": commit.stdout.strip(), "job": job, "images": images, "budget_gib": budget, **found}
        results.add(row)
        print(row, flush=True)


if __name__ == "__main__":
    shell(main)
