"""The tables of README.md and docs/: one function for each, from the CSV files in results/."""

import re
from statistics import median

import cost_tables
import paper_tables
import ranks_tables
from cells import (
    PATTERNS,
    average,
    changed,
    comparison,
    flags,
    load,
    quoted,
    spread,
    table,
)
from deploy_tables import export_sizes, exports, int8, latency
from headline_tables import default, headline

PAPER_METHODS = ("MP", "Wanda", "MP+", "SparseGPT", "SNOWS fast", "SNOWS best", "SNOWS paper")


def accuracy() -> str:
    """One row per pattern: every method's accuracy, its mean over the seeds and how far they spread."""
    rows = load("resnet20_cifar10_accuracy")
    zeros = {row["pattern"]: row["sparsity"] for row in rows if "--protocol" not in row["flags"]}
    columns = {"MP (mask only)": ("MP", ""), "MP+": ("MP+", "")}
    columns |= {"SNOWS, layer by layer": ("SNOWS", "--joint_steps 0")}
    columns |= {"SNOWS, published protocol": ("SNOWS", "--protocol published"), "**SNOWS**": ("SNOWS", "")}
    cells = []
    for pattern in sorted(zeros, key=lambda pattern: (":" in pattern, zeros[pattern])):  # unstructured first
        found = [
            [row for row in rows if (row["pattern"], row["images"], row["algo"], row["flags"]) == (pattern, 1024, *run)]
            for run in columns.values()
        ]
        products = average(found[-1], "curvature_products")
        cells.append([pattern, f"{zeros[pattern]:.2%}", *(spread(f) for f in found), products and round(products)])
    others = {}
    for row in rows:
        if row["images"] != 1024 or (row["algo"], row["flags"]) not in columns.values():
            others.setdefault((row["pattern"], quoted(flags(row))), []).append(row)
    more = [
        f"{pattern}, {changes}: {spread(found)}; {average(found, 'seconds'):,.0f} s."
        for (pattern, changes), found in others.items()
    ]
    return "\n\n".join([table(["pattern", "zeros", *columns, "products"], cells), *more])


def ablation() -> str:
    """One row per setting, each named by what it changes of the first."""
    rows = load("resnet20_cifar10_ablation")
    cells = [
        [changed(row, rows[0]), row["accuracy"], round(row["curvature_products"]), round(row["seconds"])]
        for row in rows
    ]
    return table(["settings", "accuracy %", "products", "seconds"], cells)


def vit_ablation() -> str:
    """One row per setting, with the accuracy at each pattern."""
    first, cells = {}, {}
    for row in load("vit_cifar10_ablation"):
        settings = changed(row, first.setdefault(row["pattern"], row))
        cells.setdefault(settings, {})[row["pattern"]] = row["accuracy"]
    lines = [[settings, *(found.get(pattern, "") for pattern in first)] for settings, found in cells.items()]
    return table(["settings", *(f"{pattern}, accuracy %" for pattern in first)], lines)


def convergence() -> str:
    """One row per layer: loss and residual after few and many products, plain, preconditioned, in several steps."""
    columns = [("plain", 15), ("plain", 100), ("preconditioned", 5), ("preconditioned", 10), ("preconditioned", 15)]
    columns += [("several steps", 10), ("several steps", 15)]
    cells = []
    for network in ("resnet20_cifar10", "vit_cifar10"):
        rows = load(f"convergence_{network}")
        found = {(row["layer"], row["kind"], row["products"]): row for row in rows}
        for layer in dict.fromkeys(row["layer"] for row in rows):
            picked = [found.get((layer, *column)) for column in columns]  # steps end early where the loss stagnates
            cells.append(
                [f"`{layer}`", *("" if p is None else f"{p['loss']:.4f} ({p['residual']:.0e})" for p in picked)]
            )
    return table(["layer", *(f"{kind}, {count}" for kind, count in columns)], cells)


def scaling() -> str:
    """One row per quantity: the exponents of time and memory."""
    names = {"images": "calibration images", "k_step": "K", "depth": "layers of the network"}
    cells = [[names[row["varied"]], row["seconds"], row["peak_memory_bytes"]] for row in load("scaling_slopes")]
    return table(["quantity", "exponent of the seconds", "exponent of the peak memory"], cells)


def vit() -> str:
    """One row per pattern: MP, MP+, SNOWS at each depth, and what share of the mask's loss of accuracy it recovers."""
    rows = load("vit_cifar10")
    found = {(row["pattern"], row["algo"], row["flags"] and row["options"]["k_step"]): row for row in rows}
    columns = {"MP (mask only)": ("MP", ""), "MP+": ("MP+", "")}
    columns |= {f"SNOWS, K = {k}": ("SNOWS", k) for k in (0, 3, 8)}
    cells = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        mask, *_ = runs = [found.get((pattern, *column)) for column in columns.values()]
        accuracies = ["" if run is None else run["accuracy"] for run in runs]
        lost, solved = mask["dense_accuracy"] - mask["accuracy"], [a for a in accuracies[2:] if a != ""]
        recovered = f"{(max(solved) - mask['accuracy']) / lost:.0%}" if solved else ""
        cells.append([pattern, f"{mask['sparsity']:.2%}", *accuracies, recovered])
    return table(["pattern", "zeros", *columns, "recovered"], cells)


def permuted() -> str:
    """One row per network and pattern: the magnitude kept, and the mean accuracy over the seeds, without and with."""
    cells = {}
    for row in load("permute"):
        pair = cells.setdefault((row["network"], row["pattern"], row["layers_permuted"]), {False: [], True: []})
        pair[row["permuted"]].append(row)
    lines = []
    for (network, pattern, layers), (without, with_) in ((key, pair.values()) for key, pair in cells.items()):
        line = [f"`{network}`", pattern, layers]
        for figure, digits in (("kept", ".1%"), ("masked_accuracy", ".2f"), ("accuracy", ".2f")):
            line.append(" / ".join(format(average(rows, figure), digits) for rows in (without, with_)))
        lines.append(line)
    figures = ["magnitude kept", "MP, accuracy %", "SNOWS, accuracy %"]
    return table(["network", "pattern", "layers permuted", *figures], lines)


def networks() -> str:
    """One row per network with random weights."""
    cells = [
        [
            f"`{row['network']}`",
            f"{row['layers_whose_loss_fell']} of {row['layers_solved']}",
            f"{row['median_loss_ratio']:.3f}",
            f"{row['sparsity']:.2%}",
            round(row["seconds"]),
            f"{row['peak_memory_bytes'] / 2**30:.1f}",
        ]
        for row in load("imagenet_random_weights")
    ]
    header = ["network", "layers whose loss fell", "median of loss after / before", "zeros", "seconds", "peak GiB"]
    return table(header, cells)


def real() -> str:
    """One row per pattern and way of a network with its real weights."""
    lines = []
    rows = [row for row in load("imagenet_real_efficientnet_lite0") if row["layers"] == "all" and not row["held_out"]]
    for row in sorted(rows, key=lambda row: PATTERNS.index(row["pattern"])):
        way = f"{row['algo']}{', channels permuted' * row['permuted']}{', classifier sparser' * row['classifier']}"
        way += ", first blocks dense" * row["first_dense"]
        way += f", K = {row['k_step']}" * (row["k_step"] != 4)
        way += ", two passes" * (row["schedule"] == 1)
        way += {0: "", 1: ", mixtures"}.get(row["mixtures"], f", {row['mixtures']} mixtures an image")
        way += f", {row['joint_steps']} joint steps" * (row["joint_steps"] > 0)
        errors = [row["accuracy"], row["agreement"], f"{row['logit_error']:.3f}"]
        lines.append([row["pattern"], row["mask"], way, *errors, f"{row['sparsity']:.1%}", round(row["seconds"])])
    figures = ["top-1 %", "agrees with dense %", "logit error", "zeros", "seconds"]
    said = f"Dense: {rows[0]['dense_accuracy']:.2f}. {rows[0]['images']} images calibrate, "
    said += f"{rows[0]['test_images']} of other classes test."
    return table(["pattern", "mask", "survivors", *figures], lines) + f"\n\n{said}"


def real_classifier() -> str:
    """The classifier alone, by the number of images: masked, solved, and only its bias solved."""
    cells: dict[int, list[str]] = {}
    for row in load("imagenet_real_efficientnet_lite0"):
        if row["layers"] == "classifier":
            cells.setdefault(row["images"], []).append(f"{row['accuracy']:.1f} / {row['logit_error']:.3f}")
    header = ["images", "masked, top-1 % / logit error", "all of it solved", "its bias solved"]
    return table(header, [[images, *row] for images, row in sorted(cells.items())])


def real_depths() -> str:
    """K at 2:4, by the calibration images that were held out."""
    lines = [
        [row["k_step"], f"{row['logit_error']:.3f}", row["agreement"], round(row["seconds"])]
        for row in load("imagenet_real_efficientnet_lite0")
        if row["held_out"]
    ]
    return table(["K", "logit error", "agrees with dense %", "seconds"], lines)


def products() -> str:
    """One row per network and curvature: what a product costs, in forward passes of its window."""
    kinds = {}
    for row in load("products"):
        kinds.setdefault((row["network"], row["curvature"], row["batch"]), []).append(row["ratio"])
    names = {"ggn": "Gauss-Newton", "hessian": "exact Hessian"}
    cells = [
        [f"`{network}`", names[curvature], batch, median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"]
        for (network, curvature, batch), ratios in kinds.items()
    ]
    return table(["network", "curvature", "images", "median of its layers", "lowest to highest"], cells)


def checkpointing() -> str:
    """One row per network: the share of a run's time that keeping every finished layer takes."""
    cells = [
        [row["network"], row["steps"], f"{row['bytes_written'] / 2**20:.1f}", f"{row['share']:.2%}"]
        for row in load("checkpointing")
    ]
    return table(["network", "layers written", "MiB written", "share of the run's time"], cells)


def memory() -> str:
    """One row per job and number of images: the host's peak before budgets held, and now."""
    rows = load("memory")
    old = rows[0]["commit"]
    peaks = {
        (row["commit"] == old, row["job"], row["budget_gib"], row["images"]): row.get("peak_bytes") for row in rows
    }
    jobs = dict.fromkeys(row["job"] for row in rows if row["commit"] != old)

    def gib(before: bool, job: str, budget: float, images: int) -> str:
        found = peaks.get((before, job, budget, images))
        return "" if found is None else f"{found / 2**30:.1f}"

    columns = ((True, 0, "before"), (True, 8, "before, 8 GiB asked"), (False, 0, "now"))
    columns += ((False, 4, "now, 4 GiB asked"), (False, 8, "now, 8 GiB asked"))
    counts = sorted({(list(jobs).index(job), images) for _, job, _, images in peaks})
    names = [(list(jobs)[index], images) for index, images in counts]
    cells = [
        [job, images, *(gib(before, job, budget, images) for before, budget, _ in columns)] for job, images in names
    ]
    return table(["job", "images", *(name for *_, name in columns)], cells)


def paper() -> str:
    """The tables of bench/paper.py, of networks with their own weights."""
    rows = [row for row in load("paper") if not row["random_weights"]]
    return re.sub("^## (.*)$", r"**\1**", paper_tables.markdown(rows, {}, PAPER_METHODS), flags=re.MULTILINE).strip()


TABLES = {
    "headline": headline,
    "default": lambda: default("resnet20_digits"),
    "vit_default": lambda: default("vit_digits"),
    "accuracy": accuracy,
    "ablation": ablation,
    "vit": vit,
    "vit_ablation": vit_ablation,
    "end_to_end": lambda: cost_tables.costs("end_to_end_resnet20_cifar10"),
    "vit_end_to_end": lambda: cost_tables.costs("end_to_end_vit_cifar10"),
    "fast": lambda: cost_tables.fast("end_to_end_resnet20_cifar10"),
    "baselines": lambda: cost_tables.costs("baselines_resnet20_cifar10"),
    "ideas": cost_tables.ideas,
    "convergence": convergence,
    "joint": cost_tables.joint,
    "scaling": scaling,
    "compare_256": lambda: comparison(load("compare_resnet20")),
    "compare_2048": lambda: comparison(load("compare_resnet20_2048")),
    "compare_vit": lambda: comparison(load("compare_vit_2048")),
    "permute": permuted,
    "networks": networks,
    "paper": paper,
    "real": real,
    "real_classifier": real_classifier,
    "real_depths": real_depths,
    "products": products,
    "checkpointing": checkpointing,
    "memory": memory,
    "ranks": ranks_tables.measured,
    "rank_kills": ranks_tables.kills,
    "ranks_model": ranks_tables.modelled,
    "exports": exports,
    "export_sizes": export_sizes,
    "int8": int8,
    "latency": latency,
}
