"""What zeros do to the time of a network on the CPU: dense, 2:4 and unstructured, on every runtime that is installed.

    pip install ".[deploy]"
    python bench/latency.py --threads 1 [--networks resnet50] [--backends torch onnxruntime] [--runs 20]

Random weights, masked by their magnitude, every layer alike: time does not depend on which numbers they are. The
networks of a line run in turn, so that a busy spell of the machine hits all. A row that the results file already holds
is not measured again.
"""

from dataclasses import asdict
from functools import cached_property

import timm
import torch
import torchvision
from common import Parser, Results
from networks import fill_zero_weights
from torch import nn

import snows
from snows.cli.environment import environment_of
from snows.cli.flags import whole
from snows.cli.measure import versions
from snows.cli.shell import shell
from snows.deploy import macs
from snows.deploy.backends import BACKENDS, Subject, eager
from snows.deploy.measure import on_backend, torch_threads
from snows.deploy.packages import HOW_TO_INSTALL

NETWORKS = {
    "resnet50": lambda: torchvision.models.resnet50(),
    "efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
    "vit_b_16": lambda: torchvision.models.vit_b_16(),
}
PATTERNS = {"dense": None, "2:4": snows.NM(2, 4)}
PATTERNS |= {str(share): snows.Unstructured(share, allocation="uniform") for share in (0.8, 0.9, 0.95)}


class Line:
    """A network with each pattern, converted for a runtime once."""

    def __init__(self, network: str, patterns: list[str], batch_size: int, pixels: int):
        self.network, self.patterns = network, patterns
        self.images = torch.randn(batch_size, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))

    @cached_property
    def subjects(self) -> dict[str, Subject]:
        torch.manual_seed(0)
        dense = fill_zero_weights(NETWORKS[self.network]().eval().requires_grad_(False))
        return {name: Subject(masked(dense, PATTERNS[name]), self.images) for name in self.patterns}

    @cached_property
    def logits(self) -> dict[str, torch.Tensor]:
        return {name: eager(subject, 1)() for name, subject in self.subjects.items()}

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of an image that are left with each pattern."""
        dense = macs.count(next(iter(self.subjects.values())).model, self.images[:1])
        return {name: sum(macs.remaining(each.model, dense).values()) for name, each in self.subjects.items()}

    def measure(self, backend: str, threads: int, runs: int) -> list[dict]:
        """A row for each pattern."""
        with torch_threads(threads):
            found = on_backend(backend, BACKENDS[backend], self.subjects, self.logits, (threads, runs))
        rows = []
        for measured in found:
            values = asdict(measured)
            pattern = values.pop("network")
            sparsity = snows.sparsity(self.subjects[pattern].model)
            rows.append({"pattern": pattern, "sparsity": sparsity, "macs": self.macs[pattern], **values})
        return rows


def masked(dense: nn.Module, pattern) -> nn.Module:
    """The network with the smallest of its weights zero."""
    return dense if pattern is None else snows.prune(dense, None, pattern, algo="MP").model


def main():
    parser = Parser(__doc__, "latency.csv")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS, metavar="NAME")
    parser.add_argument("--runs", type=whole(1), default=20, help="forward passes of each (default: %(default)s)")
    parser.add_argument("--batch_size", type=whole(1), default=1, help="images of a pass (default: %(default)s)")
    parser.add_argument("--pixels", type=whole(32), default=224, help="a side of the images (default: %(default)s)")
    parser.set_defaults(threads=1)
    args = parser.parse()
    absent = [name for name in args.backends if BACKENDS[name].missing]
    if absent:
        print(f"not installed: {', '.join(absent)} ({HOW_TO_INSTALL})")
    backends = {name: BACKENDS[name] for name in args.backends if name not in absent}
    how = {"threads": args.threads, "runs": args.runs, "batch_size": args.batch_size, "pixels": args.pixels}
    runs = [how | {"network": network, "backend": name} for network in args.networks for name in backends]
    results, line = Results(args.out), None
    for place, run in results.claimed(runs):
        if line is None or line.network != run["network"]:
            line = None  # before another takes as much memory
            line = Line(run["network"], args.patterns, args.batch_size, args.pixels)
        environment = environment_of("cpu") | versions(backends)
        rows = [run | row for row in line.measure(run["backend"], args.threads, args.runs)]
        results.add(*(row | {"environment": environment} for row in rows))
        print(f"{place}:", *rows, sep="\n  ", flush=True)


if __name__ == "__main__":
    shell(main)
