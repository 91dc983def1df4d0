"""Ideas that might raise the accuracy at the same images, each alone against the defaults.

    python bench/ideas.py --checkpoint resnet20_cifar10.pt --dset cifar10.npz [--images 256] [--patterns 1:4]

The ResNet-20 of bench/cifar10.py. An idea is judged by `held_out_error`, the relative error of the logits on training
images that no calibration draws; the accuracy on the test images comes last. What is no option of the library is done
here from outside: by a solver, images and masks of its own. A row that the results file already holds is not measured
again; the same command in a second shell takes rows that the first is not at.
"""

import itertools
from dataclasses import dataclass, field

import torch
from common import Parser, Results
from networks import PATTERNS, Bench, held_out, weights, with_counts
from torch import Tensor

import snows
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.masks.saliency import SALIENCIES
from snows.methods import snows_with
from snows.solve.layer import Solver
from snows.solve.solver import solve
from snows.zoo.evaluate import accuracy, score

NETWORK = "resnet20_cifar10"


@dataclass(frozen=True)
class Idea:
    """What is not as by default.

    options: as snows.Options takes them. mask: how masks are chosen, layer by layer, of each as many weights as
        magnitudes would keep. mirrored: every calibration image, and its mirror image. logits: times what the logits
        weigh in the joint steps otherwise. permuted: channels first in an order in which N:M keeps more.
    """

    options: dict = field(default_factory=dict)
    mask: str = "MP"
    mirrored: bool = False
    logits: float = 1.0
    permuted: bool = False


IDEAS = {
    "the defaults": Idea(),
    "no schedule": Idea({"schedule": 0}),
    "a schedule of four": Idea({"schedule": 4}),
    "joint steps behind each pattern on the way": Idea({"joint_stages": True}),
    "a schedule of four, joint steps behind each": Idea({"schedule": 4, "joint_stages": True}),
    "eight joint steps": Idea({"joint_steps": 8}),
    "joint steps of 20 products": Idea({"joint_CG_iterations": 20}),
    "two Newton steps a layer": Idea({"newton_steps": 2}),
    "every image, and its mirror image": Idea(mirrored=True),
    "SparseGPT's choice, as many of each layer": Idea(mask="SparseGPT"),
    "OBS's choice, as many of each layer": Idea(mask="OBS"),
    "ALPS's choice": Idea(mask="ALPS"),
    "ALPS's choice, a schedule of four": Idea({"schedule": 4}, mask="ALPS"),
    "ALPS's choice, a schedule of four, joint steps behind each": Idea(
        {"schedule": 4, "joint_stages": True}, mask="ALPS"
    ),
    "logits of 20 times the weight in the joint steps": Idea(logits=20.0),
    "channels in another order": Idea(permuted=True),
    "ALPS's choice, channels in another order": Idea(mask="ALPS", permuted=True),
    "a mixture of two beside every image": Idea({"mixtures": 1}),
    "ALPS's choice, channels in another order, a mixture beside every image": Idea(
        {"mixtures": 1}, mask="ALPS", permuted=True
    ),
    "ALPS's choice, channels in another order, three mixtures beside every image": Idea(
        {"mixtures": 3}, mask="ALPS", permuted=True
    ),
}


def with_mirror_images(images: Tensor, seed: int) -> Tensor:
    """The images and what they look like in a mirror, in random order."""
    both = torch.cat([images, images.flip(-1)])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]


def weighing_logits(times: float) -> Solver:
    """The library's solver, on joint objectives in which the last depth, the logits, weighs so many times as much."""

    def solver(objective, theta, support, precondition, options):
        if len(objective.window.layers) > 1:
            objective.coefficients[-1] *= times
        return solve(objective, theta, support, precondition, options)

    return solver


def prune(bench: Bench, run: dict) -> snows.Pruned:
    """The network that an idea prunes."""
    idea, seed, pattern = IDEAS[run["idea"]], run["seed"], PATTERNS[run["pattern"]]
    images, _ = bench.data.calibration(run["images"], seed)
    how = {"layers": bench.layers, "device": bench.device, "mask_alg": idea.mask}
    if idea.logits != 1:
        how["algo"] = snows_with(weighing_logits(idea.logits))
    model = permute(bench.model, pattern, bench.layers).model if idea.permuted else bench.model
    if SALIENCIES[idea.mask].score is not None:
        pattern = with_counts(bench.model, pattern, bench.layers)
    images = with_mirror_images(images, seed) if idea.mirrored else images
    return snows.prune(model, images, pattern, snows.Options(seed=seed, **idea.options), **how)


def main():
    parser = Parser(__doc__, "ideas.csv", "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("--patterns", nargs="+", default=["1:4", "unstructured 0.9"], choices=PATTERNS)
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: %(default)s)")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=IDEAS)
    args = parser.parse()
    bench = Bench(NETWORK, weights(NETWORK, args.checkpoint), args.dset, args.device)
    results = Results(args.out, args.device, (args.checkpoint, args.dset))
    unseen = list(held_out(bench.data))
    _, logits = score(bench.model, unseen, bench.device)
    cases = itertools.product(args.ideas, args.patterns, args.seeds)
    shared = {"network": NETWORK, "images": args.images}
    cases = [(a, b, c) for a, b, c in cases if ":" in b or not IDEAS[a].permuted]
    for place, run in results.claimed([{**shared, "idea": a, "pattern": b, "seed": c} for a, b, c in cases]):
        pruned = prune(bench, run)
        found, _ = score(pruned.model, unseen, bench.device, logits)
        row = {
            **run,
            "held_out_error": found.logit_error,
            "accuracy": accuracy(pruned.model, bench.test, bench.device),
            "sparsity": pruned.sparsity,
            "products": pruned.curvature_products,
            "seconds": pruned.seconds,
        }
        results.add(row)
        print(f"{place}: {row}", flush=True)


if __name__ == "__main__":
    shell(main)
