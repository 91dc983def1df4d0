"""The methods people compare with, in one table and one plot: masks x ways to set the survivors x patterns x seeds.

    python bench/compare.py resnet20 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/compare.py vit --dset cifar10.npz --patterns 2:4 1:4 --masks MP Wanda --seeds 0 --schedule 0

The networks are those of bench/cifar10.py. Each row is written as soon as it is measured, and a row that the results
file already holds is not measured again, so an interrupted grid goes on where it stopped, and the same command started
once more measures other rows beside the first. A row that the network does not allow is left out, and said. Next to
the results file lie the Markdown table (.md) and the plot (.png), of the rows with the same number of images and the
same options.
"""

import argparse
import io
import itertools
import statistics
from pathlib import Path

from cifar10 import ROOT, Bench
from rows import Results

import snows
from snows import options
from snows.cli import run_folder
from snows.cli.shell import shell
from snows.errors import UsageError
from snows.masks.saliency import LAYER_WISE, MASK_ALGORITHMS
from snows.solve.layer import SETTLED
from snows.zoo.evaluate import accuracy

PATTERNS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "1:4", "2:8")
ALONE = {"SparseGPT": "SparseGPT"}  # what a mask's own method does with the survivors; the others keep them as they are
WAYS = ("alone", "MP+", "SNOWS")
LOOKS = {
    "alone": {"linestyle": ":", "marker": "."},
    "MP+": {"linestyle": "--", "marker": "x"},
    "SNOWS": {"linestyle": "-", "marker": "D", "markersize": 4},
}
COLOURS = dict(zip(MASK_ALGORITHMS, ("tab:gray", "tab:orange", "tab:green", "tab:blue")))


def pattern_of(text: str, mask: str) -> snows.NM | snows.Unstructured:
    """The pattern "2:4", or "0.7" of all parameters, allocated as suits the mask's scores."""
    if ":" in text:
        return snows.NM.parse(text)
    try:
        return snows.Unstructured(float(text), normalise=mask in LAYER_WISE)
    except ValueError:
        raise UsageError(f"pattern '{text}' is neither N:M nor a sparsity.") from None


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


def settings(run: dict, images: int, chosen: snows.Options) -> dict:
    """What a row's figures depend on besides: the options as its algorithm settles them, so that MP+ knows few."""
    settled = vars(chosen.but(**SETTLED.get(algorithm(run), {})))
    return {"images": images, **{name: value for name, value in settled.items() if name != "seed"}}


def measure(bench: Bench, run: dict, images: int, chosen: snows.Options) -> dict:
    """One row's figures."""
    calibration, _ = bench.data.calibration(images, run["seed"])
    pruned = snows.prune(
        bench.model,
        calibration,
        pattern_of(run["pattern"], run["mask"]),
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


def over_seeds(rows: list[dict], **wanted) -> list[float]:
    """The accuracies of all the seeds of one cell."""
    return [row["accuracy"] for row in rows if all(row["run"][key] == value for key, value in wanted.items())]


def found(rows: list[dict], key: str, order: tuple[str, ...]) -> list[str]:
    """The values that the rows have, known ones in their usual order and first."""
    values = {row["run"][key] for row in rows}
    return [value for value in order if value in values] + sorted(values - set(order))


def table(rows: list[dict]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds: a line for each mask of each pattern."""
    ways = found(rows, "way", WAYS)
    lines = [["pattern", "mask", *ways], ["---"] * (2 + len(ways))]
    for pattern, mask in itertools.product(found(rows, "pattern", PATTERNS), found(rows, "mask", MASK_ALGORITHMS)):
        cells = [over_seeds(rows, pattern=pattern, mask=mask, way=way) for way in ways]
        if any(cells):
            lines.append([pattern, mask, *map(cell, cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(accuracies: list[float]) -> str:
    if not accuracies:
        return ""
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{statistics.mean(accuracies):.2f}{spread}"


def plot(rows: list[dict]) -> bytes:
    """Accuracy against sparsity as a PNG: unstructured sparsities on the left, N:M patterns on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    legend = {}
    for panel, nm in zip(axes, (False, True)):
        legend = draw(panel, [row for row in rows if (":" in row["run"]["pattern"]) == nm]) | legend
        legend["dense"] = panel.axhline(rows[0]["dense_accuracy"], color="black", linewidth=0.8)
        panel.grid(alpha=0.3)
    axes[0].set(xlabel="sparsity, % of all parameters", ylabel="accuracy, %")
    axes[1].set(xlabel="pattern")
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes[1].legend(legend.values(), legend.keys(), fontsize="x-small", handlelength=4, **place)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    plt.close(figure)
    return image.getvalue()


def draw(panel, rows: list[dict]) -> dict:
    """Each method's mean and, over the seeds, its least and most; returns {method: what stands for it in a legend}.

    Sparsities are joined by lines. N:M patterns are not, as nothing lies between two: there masks stand side by side.
    """
    patterns, masks = found(rows, "pattern", PATTERNS), found(rows, "mask", MASK_ALGORITHMS)
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


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("network", choices=("resnet20", "vit"))
    flags.add_argument("--checkpoint", type=Path, help="weights of the ResNet-20 (required) or of the ViT")
    flags.add_argument("--dset", type=Path, required=True, help="an .npz of CIFAR-10")
    flags.add_argument("--masks", nargs="+", default=list(MASK_ALGORITHMS), choices=MASK_ALGORITHMS)
    flags.add_argument(
        "--ways",
        nargs="+",
        default=list(WAYS),
        choices=WAYS,
        help="how the survivors are set: as the mask's own method does, by least squares, by SNOWS (default: all)",
    )
    flags.add_argument("--patterns", nargs="+", default=list(PATTERNS), help="N:M, or shares of all parameters")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--images", type=int, default=2048, help="calibration images (default: 2048)")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--out", type=Path, help="results file (default: results/compare_NETWORK.json)")
    options.add_flags(flags)
    return flags


def main():
    args = parser().parse_args()
    if args.network == "resnet20" and args.checkpoint is None:
        raise UsageError("--checkpoint is required for the ResNet-20.")
    for pattern in args.patterns:
        pattern_of(pattern, "MP")
    chosen = options.from_flags(args, seed=0)
    out = args.out or ROOT / "results" / f"compare_{args.network}.json"
    checkpoint = args.checkpoint or ROOT / "checkpoints" / "vit_cifar10.safetensors"
    results = Results(out, args.device, (checkpoint, args.dset))
    runs = [{"run": run, "settings": settings(run, args.images, chosen)} for run in grid(args)]
    if results.missing(runs):
        bench = Bench(args.network == "vit", checkpoint, args.dset, args.device)
    for position, run in results.claimed(runs):
        name = f"{position}: {' '.join(map(str, run['run'].values()))}"
        try:
            figures = measure(bench, run["run"], args.images, chosen)
        except UsageError as error:  # a sparsity beyond what the network's prunable layers hold, say
            print(f"{name}: left out: {error}", flush=True)
            continue
        results.add({**run, **figures})
        print(f"{name}: {figures['accuracy']:.2f} %, {figures['seconds']:.0f} s", flush=True)
    shown = [row for row in results.rows() if row["settings"] == settings(row["run"], args.images, chosen)]
    if not shown:
        raise UsageError("no row could be measured.")
    run_folder.write(out.with_suffix(".md"), table(shown))
    run_folder.write(out.with_suffix(".png"), plot(shown))
    print(table(shown))


if __name__ == "__main__":
    shell(main)
