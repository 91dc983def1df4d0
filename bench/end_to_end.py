"""Accuracy and held-out loss against seconds: SNOWS, its presets, first-order solvers on its objective, and baselines.

    python bench/end_to_end.py resnet20_cifar10 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/end_to_end.py vit_cifar10 --dset cifar10.npz
    python bench/end_to_end.py resnet20_cifar10 --methods best MP+ baselines --budgets 30 120 480 --out FILE ...

The defaults at three costs: one pass over the layers, which is the preset "fast"; all passes; joint steps after them.
Adam and L-BFGS (torch.optim) minimise the objective of the first, layer by layer, over the same images; their
"products" are gradients, which cost about as much. The baselines are those of bench/baselines.py, and ALPS: its masks,
solved by layer-wise least squares. A training takes each of the
seconds that --budgets names, at each learning rate of RATES with the first seed; the others take the rate that was best
on the training images that are held out.

held_out_loss is the squared error of the logits on the test images, held_out_error that on the held-out training
images, both relative to the dense network's. One row per run, and a plot; rows that the file already holds are not
measured again.
"""

import argparse
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from baselines import RATES, TRAININGS, clock, reestimated, train, within
from cells import chosen_rates, of_chosen_rates, seconds_of, training_of
from common import Parser, Results, panels, save_figure
from matplotlib import colormaps
from networks import DRAWN, NETWORKS, PATTERNS, SEEDS, Bench, held_out, weights
from torch import Tensor, nn

import snows
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.methods import snows_with
from snows.solve.objective import Objective
from snows.solve.solver import SolveStats
from snows.zoo.evaluate import accuracy

EVALUATIONS = 40  # gradients of a first-order solver, per layer
ONE_PASS = snows.Options(schedule=0, joint_steps=0)


def first_order(build):
    """A solver of one layer that drives a torch.optim optimiser with full gradients on the support."""

    def solver(objective: Objective, theta: Tensor, support: Tensor, *_) -> tuple[Tensor, SolveStats]:
        variable = theta.clone().requires_grad_()
        optimizer, losses, best = build([variable]), [], (float("inf"), theta)

        def closure():
            nonlocal best
            loss, variable.grad = 0.0, torch.zeros_like(variable)
            with torch.enable_grad():
                for i in range(len(objective)):
                    features = objective.features(objective.inputs(i), variable.where(support, theta))
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
        return solution.where(support, theta), stats

    return solver


def lbfgs(parameters):
    limit = {"max_eval": EVALUATIONS, "max_iter": EVALUATIONS}
    return torch.optim.LBFGS(parameters, **limit, line_search_fn="strong_wolfe")


METHODS = {  # name -> arguments of snows.prune, and whether channels are permuted first
    "MP": {"algo": "MP"},
    "MP+": {"algo": "MP+"},
    "fast": {"options": snows.Options.preset("fast")},
    "best, layer by layer": {"options": snows.Options(joint_steps=0)},
    "best": {},
    "best, masks by ALPS": {"mask_alg": "ALPS"},
    "best, permuted, masks by ALPS": {"mask_alg": "ALPS", "permuted": True},
    "best, permuted, masks by ALPS, mixtures": {
        "mask_alg": "ALPS",
        "permuted": True,
        "options": snows.Options(mixtures=1),
    },
    "paper, K = 4": {"options": snows.Options.preset("paper")},
    "paper, K = 8": {"options": snows.Options.preset("paper", k_step=8)},
    "Adam": {"options": ONE_PASS, "algo": snows_with(first_order(lambda p: torch.optim.Adam(p, lr=3e-3)))},
    "L-BFGS": {"options": ONE_PASS, "algo": snows_with(first_order(lbfgs))},
    "ALPS": {"algo": "MP+", "mask_alg": "ALPS"},
}
REESTIMATED = "MP, BatchNorm re-estimated"
BASELINES = [REESTIMATED, "ALPS", *TRAININGS]
EVERY = [*dict.fromkeys([*METHODS, *BASELINES])]
COLOURS = colormaps["tab20"].colors  # 20: with the three marks of the trainings, none looks like another
GROUPS = {"snows": [name for name in METHODS if name not in BASELINES], "baselines": BASELINES}


def prune(bench: Bench, run: dict, images: Tensor, algo: str | None = None) -> snows.Pruned:
    """The network that a run prunes: by its method, or by another algorithm from its magnitude masks."""
    arguments, pattern = {"algo": algo} if algo else dict(METHODS[run["method"]]), PATTERNS[run["pattern"]]
    model = bench.model
    if arguments.pop("permuted", False):
        model = permute(model, pattern, bench.layers).model
    options = arguments.pop("options", snows.Options()).but(seed=run["seed"])
    arguments |= {"layers": bench.layers, "device": bench.device}
    return snows.prune(model, images, pattern, options, **arguments)


def solve(bench: Bench, run: dict, images: Tensor) -> tuple[nn.Module, dict]:
    """(the run's network, what it took)"""
    method, started = run["method"], clock(bench.device)

    def spent() -> float:
        return clock(bench.device) - started

    if method in METHODS:
        pruned = prune(bench, run, images)
        figures = {"seconds": pruned.seconds, "peak_memory_bytes": pruned.peak_memory_bytes}
        return pruned.model, {**figures, "cpu_seconds": spent(), "products": pruned.curvature_products}
    if method == REESTIMATED:
        model = reestimated(prune(bench, run, images, "MP").model, images, device=bench.device)
        return model, {"cpu_seconds": spent(), "products": 0}
    start, training = TRAININGS[method]
    pruned = prune(bench, run, images, start)
    job, taken = (bench.model, pruned.model, pruned.masks, images), spent()
    training = replace(training, lr=run["lr"], seed=run["seed"])
    training = within(run["budget"] - taken, *job, training, bench.device)
    started = clock(bench.device)  # what the timing took is not the method's
    model = train(*job, training, bench.device)
    passes = training.steps * min(training.batch_size, len(images)) / len(images)
    return model, {"cpu_seconds": taken + spent(), "products": passes, "steps": training.steps}


@torch.no_grad()
def held_out_loss(bench: Bench, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Relative squared error of the logits on some images; None: they are not finite."""
    error = total = 0.0
    for images, _ in batches:
        dense = bench.model(images.to(bench.device))
        error += (model(images.to(bench.device)) - dense).square().sum()
        total += dense.square().sum()
    found = (error / total).item()
    return found if math.isfinite(found) else None


def measure(bench: Bench, run: dict, held: list) -> dict:
    """The figures of one row; `held` are batches of training images that no calibration draws."""
    images, _ = bench.data.calibration(run["images"], run["seed"])
    model, took = solve(bench, run, images)
    return {
        "accuracy": accuracy(model, bench.test, bench.device),
        "held_out_loss": held_out_loss(bench, model, bench.test),
        "held_out_error": held_out_loss(bench, model, held),
        "sparsity": snows.result.sparsity(model),
        **took,
    }


def first_runs(args: argparse.Namespace) -> list[dict]:
    """What each row runs; of a training only those with the first seed, at each learning rate."""
    runs, methods = [], [name for each in args.methods for name in GROUPS.get(each, [each])]
    for pattern, method, seed in itertools.product(args.patterns, methods, args.seeds):
        if METHODS.get(method, {}).get("permuted") and ":" not in pattern:
            continue
        run = {"network": args.network, "images": args.images, "method": method, "pattern": pattern, "seed": seed}
        if method not in TRAININGS:
            runs.append(run)
        elif seed == min(args.seeds):
            rates = RATES[TRAININGS[method][1].optimizer]
            runs += [{**run, "budget": budget, "lr": lr} for budget in args.budgets for lr in rates]
    return runs


def other_seeds(first: list[dict], seeds: list[int], results: Results) -> list[dict]:
    """The runs of the trainings with the other seeds, at the rates that were best with the first.

    A training whose rates are not all measured yet is left out: another process is at it.
    """
    waiting = {training_of(run) for run in results.missing(first) if "lr" in run}
    best = chosen_rates(results.rows())
    chosen = [run for run in first if "lr" in run and training_of(run) not in waiting]
    chosen = [run for run in chosen if run["lr"] == best.get(training_of(run))]
    return [{**run, "seed": seed} for run in chosen for seed in seeds if seed != run["seed"]]


def plot(rows: list[dict]):
    """Accuracy over seconds, one panel per pattern; a training's budgets are joined by lines."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    figure, axes = panels(1, len(patterns), 4.5 * len(patterns), 3.5)
    for pattern, panel in zip(patterns, axes[0]):
        for i, name in enumerate(EVERY):
            points = [row for row in rows if row["pattern"] == pattern and row["method"] == name]
            points = sorted((seconds_of(row), row["accuracy"]) for row in points)
            style = "o" if name in METHODS else f"{'xvs'[i % 3]}:"
            look = {"color": COLOURS[i % len(COLOURS)], "markersize": 4, "label": name}
            panel.semilogx(*zip(*points), style, **look) if points else None
        panel.set_title(pattern)
        panel.set_xlabel("seconds")
        panel.set_ylabel("accuracy %")
    handles = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
    return figure


def main():
    parser = Parser(__doc__, "end_to_end_{network}.csv", "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"], choices=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=["snows"], choices=[*GROUPS, *EVERY])
    parser.add_argument("--images", type=int, default=128, help=f"at most {DRAWN} (default: %(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[30, 120], help="seconds of the trainings")
    args = parser.parse()
    if args.images > DRAWN or max(args.seeds) >= SEEDS:
        parser.error(f"no images are held out from more than {DRAWN} images, nor from seeds above {SEEDS - 1}")
    checkpoint = weights(args.network, args.checkpoint)
    results = Results(args.out, args.device, (checkpoint, args.dset))
    bench = Bench(args.network, checkpoint, args.dset, args.device)
    held, first = list(held_out(bench.data)), first_runs(args)
    for find in (lambda: first, lambda: other_seeds(first, args.seeds, results)):
        for place, run in results.claimed(find()):
            row = {**run, **measure(bench, run, held)}
            results.add(row)
            print(f"{place}: {row}", flush=True)
    save_figure(plot(of_chosen_rates(results.rows())), args.out)


if __name__ == "__main__":
    shell(main)
