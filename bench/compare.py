"""The methods people compare with, in one table and one plot: masks x ways to set the survivors x patterns x seeds.

    python bench/compare.py resnet20 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/compare.py vit --dset cifar10.npz --patterns 2:4 1:4 --masks MP Wanda --seeds 0 --schedule 0

The networks are those of bench/cifar10.py. Each row is written as soon as it is measured, and a row that the results
file already holds is not measured again, so an interrupted grid goes on where it stopped, and the same command started
once more measures other rows beside the first. A row that the network does not allow is left out, and said. At the end
it prints a table and draws a plot of the rows with the same number of images and the same options.
"""

import argparse
import itertools
import statistics

from cells import MASKS, PATTERNS, WAYS, comparison, found, over_seeds
from common import Parser, Results, panels, pattern_of, save_figure
from networks import Bench, weights

import snows
from snows.cli.option_flags import add_option_flags, options_of
from snows.cli.shell import shell
from snows.errors import UsageError
from snows.methods import METHODS
from snows.zoo.evaluate import accuracy

NETWORKS = {"resnet20": "resnet20_cifar10", "vit": "vit_cifar10"}
ALONE = {"SparseGPT": "SparseGPT"}  # what a mask's own method does with the survivors; the others keep them as they are
LOOKS = {
    "alone": {"linestyle": ":", "marker": "."},
    "MP+": {"linestyle": "--", "marker": "x"},
    "SNOWS": {"linestyle": "-", "marker": "D", "markersize": 4},
}
COLOURS = dict(zip(MASKS, ("tab:gray", "tab:orange", "tab:green", "tab:blue")))


def grid(args: argparse.Namespace) -> list[dict]:
    """What each row runs.

    Magnitude masks whose survivors stay as they are depend on no seed. Under N:M, OBS chooses as Wanda does: its factor
    for each output row does not change the order within a group.
    """
    runs = [
        {"pattern": pattern, "mask": mask, "way": way, "seed": seed}
        for seed, pattern, mask, way in itertools.product(args.seeds, args.patterns, args.masks, args.ways)
        if mask != "OBS" or ":" not in pattern or "Wanda" not in args.masks
    ]
    return [run for run in runs if run["seed"] == args.seeds[0] or (run["mask"], run["way"]) != ("MP", "alone")]


def algorithm(run: dict) -> str:
    """How a row's survivors are set."""
    return ALONE.get(run["mask"], "MP") if run["way"] == "alone" else run["way"]


def row_of(run: dict, images: int, chosen: snows.Options) -> dict:
    """What tells a row from others: its run, and the options as its algorithm settles them, so that MP+ knows few."""
    settled = vars(METHODS[algorithm(run)].settle(chosen))
    return {**run, "images": images, "options": {name: value for name, value in settled.items() if name != "seed"}}


def measure(bench: Bench, run: dict, chosen: snows.Options) -> dict:
    """One row's figures."""
    calibration, _ = bench.data.calibration(run["images"], run["seed"])
    pruned = snows.prune(
        bench.model,
        calibration,
        pattern_of(run["pattern"]),
        chosen.but(seed=run["seed"]),
        mask_alg=run["mask"],
        algo=algorithm(run),
        layers=bench.layers,
        device=bench.device,
    )
    return {
        "dense_accuracy": bench.dense_accuracy,
        "accuracy": accuracy(pruned.model, bench.test, bench.device),
        "sparsity": pruned.sparsity,
        "curvature_products": pruned.curvature_products,
        "seconds": pruned.seconds,
        "test_images": len(bench.data.test),
    }


def plot(rows: list[dict]):
    """Accuracy against sparsity: unstructured sparsities on the left, N:M patterns on the right."""
    figure, axes = panels(1, 2, 11, 4.5, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    left, right = axes[0]
    legend = {}
    for panel, nm in ((left, False), (right, True)):
        legend = draw(panel, [row for row in rows if (":" in row["pattern"]) == nm]) | legend
        legend["dense"] = panel.axhline(rows[0]["dense_accuracy"], color="black", linewidth=0.8)
        panel.grid(alpha=0.3)
    left.set(xlabel="sparsity, % of all parameters", ylabel="accuracy, %")
    right.set(xlabel="pattern")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    right.legend(legend.values(), legend.keys(), fontsize="x-small", handlelength=4, **place)
    return figure


def draw(panel, rows: list[dict]) -> dict:
    """Each method's mean and, over the seeds, its least and most; returns {method: what stands for it in a legend}.

    Sparsities are joined by lines. N:M patterns are not, as nothing lies between two: there masks stand side by side.
    """
    patterns, masks = found(rows, "pattern", PATTERNS), found(rows, "mask", MASKS)
    nm, drawn = any(":" in pattern for pattern in patterns), {}
    for mask, way in itertools.product(masks, found(rows, "way", WAYS)):
        cells = {pattern: over_seeds(rows, pattern=pattern, mask=mask, way=way) for pattern in patterns}
        cells = {pattern: accuracies for pattern, accuracies in cells.items() if accuracies}
        if not cells:
            continue
        aside = 0.2 * (masks.index(mask) - (len(masks) - 1) / 2)
        x = [patterns.index(p) + aside if nm else 100 * float(p) for p in cells]
        means = [statistics.mean(accuracies) for accuracies in cells.values()]
        least, most = [min(each) for each in cells.values()], [max(each) for each in cells.values()]
        look = {"color": COLOURS[mask], **LOOKS[way]}
        (drawn[f"{mask}, {way}"],) = panel.plot(x, means, **look | ({"linestyle": "none"} if nm else {}))
        if nm:
            panel.vlines(x, least, most, color=COLOURS[mask])
        else:
            panel.fill_between(x, least, most, color=COLOURS[mask], alpha=0.15, linewidth=0)
    if nm:
        panel.set_xticks(range(len(patterns)), patterns)
    return drawn


def parser() -> Parser:
    flags = Parser(__doc__, "compare_{network}.csv", "--checkpoint", "--dset", "--device", "--seeds")
    flags.add_argument("network", choices=NETWORKS)
    flags.add_argument("--masks", nargs="+", default=list(MASKS), choices=MASKS)
    flags.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=WAYS,
        help="how the survivors are set: as the mask's own method does, by least squares, by SNOWS (default: all)",
    )
    flags.add_argument("--patterns", nargs="+", default=list(PATTERNS), help="N:M, or shares of all parameters")
    flags.add_argument("--images", type=int, default=2048, help="calibration images (default: 2048)")
    flags.set_defaults(seeds=[0, 1, 2])
    add_option_flags(flags)
    return flags


def main():
    args = parser().parse()
    for pattern in args.patterns:
        pattern_of(pattern)
    network, chosen = NETWORKS[args.network], options_of(args, seed=0)
    checkpoint = weights(network, args.checkpoint)
    results = Results(args.out, args.device, (checkpoint, args.dset))
    rows = [row_of(run, args.images, chosen) for run in grid(args)]
    if results.missing(rows):
        bench = Bench(network, checkpoint, args.dset, args.device)
    for position, row in results.claimed(rows):
        name = f"{position}: {row['pattern']} {row['mask']} {row['way']} {row['seed']}"
        try:
            figures = measure(bench, row, chosen)
        except UsageError as error:  # a sparsity beyond what the network's prunable layers hold, say
            print(f"{name}: left out: {error}", flush=True)
            continue
        results.add({**row, **figures})
        print(f"{name}: {figures['accuracy']:.2f} %, {figures['seconds']:.0f} s", flush=True)
    shown = [row for row in results.rows() if row_of(row, args.images, chosen).items() <= row.items()]
    if not shown:
        raise UsageError("no row could be measured.")
    save_figure(plot(shown), args.out, "png")
    print(comparison(shown))


if __name__ == "__main__":
    shell(main)
