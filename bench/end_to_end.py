"""Accuracy and held-out loss against seconds and products: both presets, MP+ and first-order solvers on one objective.

    python bench/end_to_end.py resnet20_cifar10 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/end_to_end.py vit_cifar10 --dset cifar10.npz

The defaults at four costs: one pass over the layers; all passes; joint steps after them; longer ones. Adam and L-BFGS
(torch.optim) minimise the objective of the first, layer by layer, over the same images; their "products" are gradients,
which cost about as much. held_out_loss is the squared error of the logits on the test images, relative to the dense
network's. One row per run, and a plot; rows that the file already holds are not measured again.
"""

import itertools

import torch
from common import Parser, Results, panels, save_figure
from networks import NETWORKS, PATTERNS, Bench, weights

import snows
from snows.cli.shell import shell
from snows.methods import snows_with
from snows.solve.objective import Objective
from snows.solve.solver import SolveStats
from snows.zoo.evaluate import accuracy

EVALUATIONS = 40  # gradients of a first-order solver, per layer
ONE_PASS = snows.Options(schedule=0, joint_steps=0)


def first_order(build):
    """A solver of one layer that drives a torch.optim optimiser with full gradients on the support."""

    def solver(objective: Objective, theta: torch.Tensor, support: torch.Tensor, *_) -> tuple[torch.Tensor, SolveStats]:
        variable = theta.clone().requires_grad_()
        optimizer, losses, best = build([variable]), [], (float("inf"), theta)

        def closure():
            nonlocal best
            loss, variable.grad = 0.0, torch.zeros_like(variable)
            with torch.enable_grad():
                for i in range(len(objective)):
                    features = objective.features(objective.inputs(i), variable * support)
                    part = objective.feature_loss(features, objective.targets(i))
                    variable.grad += torch.autograd.grad(part, variable)[0]
                    loss = loss + part.detach()
            losses.append(loss.item())
            best = min(best, (losses[-1], variable.detach().clone()), key=lambda pair: pair[0])
            return loss

        while len(losses) < EVALUATIONS:
            before = len(losses)
            optimizer.step(closure)
            if len(losses) == before:
                break
        loss, solution = best
        stats = SolveStats(losses[0], loss, newton_steps=1, products=len(losses))
        return solution * support, stats

    return solver


METHODS = {  # name -> arguments of snows.prune
    "MP": {"algo": "MP"},
    "MP+": {"algo": "MP+"},
    "best, one pass": {"options": ONE_PASS},
    "best, layer by layer": {"options": snows.Options(joint_steps=0)},
    "best": {},
    "best, longer joint steps": {"options": snows.Options(joint_CG_iterations=20)},
    "paper, K = 4": {"options": snows.Options.preset("paper")},
    "paper, K = 8": {"options": snows.Options.preset("paper", k_step=8)},
    "Adam": {"options": ONE_PASS, "algo": snows_with(first_order(lambda p: torch.optim.Adam(p, lr=3e-3)))},
    "L-BFGS": {
        "options": ONE_PASS,
        "algo": snows_with(
            first_order(
                lambda p: torch.optim.LBFGS(
                    p, max_eval=EVALUATIONS, max_iter=EVALUATIONS, line_search_fn="strong_wolfe"
                )
            )
        ),
    },
}


@torch.no_grad()
def held_out_loss(bench: Bench, model: torch.nn.Module) -> float:
    """Relative squared error of the logits on the test images."""
    error = total = 0.0
    for images, _ in bench.test:
        dense = bench.model(images.to(bench.device))
        error += (model(images.to(bench.device)) - dense).square().sum()
        total += dense.square().sum()
    return (error / total).item()


def measure(bench: Bench, name: str, pattern: str, seed: int, count: int) -> dict:
    """One run."""
    arguments = dict(METHODS[name])
    options = arguments.pop("options", snows.Options()).but(seed=seed)
    images, _ = bench.data.calibration(count, seed)
    pruned = snows.prune(
        bench.model, images, PATTERNS[pattern], options, layers=bench.layers, device=bench.device, **arguments
    )
    return {
        "accuracy": accuracy(pruned.model, bench.test, bench.device),
        "held_out_loss": held_out_loss(bench, pruned.model),
        "seconds": pruned.seconds,
        "products": pruned.curvature_products,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "sparsity": pruned.sparsity,
    }


def plot(rows: list[dict]):
    """Accuracy over seconds, one panel per pattern, one point per run."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    figure, axes = panels(1, len(patterns), 4.5 * len(patterns), 3.5)
    for pattern, panel in zip(patterns, axes[0]):
        for name in METHODS:
            points = [row for row in rows if row["pattern"] == pattern and row["method"] == name]
            panel.semilogx([p["seconds"] for p in points], [p["accuracy"] for p in points], "o", label=name)
        panel.set_title(pattern)
        panel.set_xlabel("seconds")
        panel.set_ylabel("accuracy %")
        panel.legend(fontsize=8)
    return figure


def main():
    parser = Parser(__doc__, "end_to_end_{network}.csv", "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"], choices=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=128)
    args = parser.parse()
    checkpoint = weights(args.network, args.checkpoint)
    results = Results(args.out, args.device, (checkpoint, args.dset))
    bench = Bench(args.network, checkpoint, args.dset, args.device)
    shared = {"network": args.network, "images": args.images}
    runs = [
        {**shared, "method": method, "pattern": pattern, "seed": seed}
        for pattern, method, seed in itertools.product(args.patterns, args.methods, args.seeds)
    ]
    for _, run in results.claimed(runs):
        row = {**run, **measure(bench, run["method"], run["pattern"], run["seed"], args.images)}
        results.add(row)
        print(row, flush=True)
    save_figure(plot(results.rows()), args.out)


if __name__ == "__main__":
    shell(main)
