"""Write the README's tables from the files in results/, so that every figure there comes from one of them.

python bench/readme.py
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; floats with two digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in line) + " |" for line in lines
    )


def markdown(name: str) -> str:
    """A table that a bench has written itself."""
    return (RESULTS / name).read_text().rstrip()


def default(name: str) -> str:
    """A run without flags."""
    m = load(name)
    rows = [
        ["dense", m["dense_accuracy"], f"{m['dense_sparsity']:.0%}"],
        ["masked only", m["masked_accuracy"], f"{m['sparsity']:.0%}"],
        ["SNOWS", m["accuracy"], f"{m['sparsity']:.0%}"],
    ]
    return (
        table(["", "accuracy %", "zeros"], rows) + f"\n\n{m['seconds']:.0f} s, {m['curvature_products']:.0f} products."
    )


def accuracy() -> str:
    """One row per pattern: every method's accuracy, its mean over the seeds and how far they spread."""
    rows = load("resnet20_cifar10_accuracy.json")["rows"]
    zeros = {row["run"]["pattern"]: row["sparsity"] for row in rows}
    columns = {
        "MP (mask only)": {"algo": "MP"},
        "MP+": {"algo": "MP+"},
        "SNOWS, layer by layer": {"algo": "SNOWS", "joint_steps": 0},
        "**SNOWS**": {"algo": "SNOWS"},
    }
    cells = []
    for pattern in sorted(zeros, key=lambda pattern: (":" in pattern, zeros[pattern])):  # unstructured first
        found = [
            [row for row in rows if row["run"] == {"pattern": pattern, **run, "images": 1024}]
            for run in columns.values()
        ]
        products = mean(found[-1], "curvature_products")
        cells.append([pattern, f"{zeros[pattern]:.2%}", *(spread(f) for f in found), products and round(products)])
    others = {}
    for row in rows:
        if row["run"]["images"] != 1024:
            flags = changed(row["run"], {"algo": "SNOWS"})
            others.setdefault((row["run"]["pattern"], flags), []).append(row)
    more = [f"{pattern}, {flags}: {spread(found)}." for (pattern, flags), found in others.items()]
    return "\n\n".join([table(["pattern", "zeros", *columns, "products"], cells), *more])


def mean(rows: list[dict], figure: str) -> float | str:
    return sum(row[figure] for row in rows) / len(rows) if rows else ""


def spread(rows: list[dict]) -> str:
    """The mean accuracy of some seeds, with the lowest, the highest and how many there are."""
    found = [row["accuracy"] for row in rows]
    if len(found) < 2:
        return "".join(f"{each:.2f}" for each in found)
    return f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)} seeds)"


def ablation() -> str:
    """One row per setting, each named by what it changes of the first."""
    rows = load("resnet20_cifar10_ablation.json")["rows"]
    cells = [
        [changed(row["run"], rows[0]["run"]), row["accuracy"], round(row["curvature_products"]), round(row["seconds"])]
        for row in rows
    ]
    return table(["settings", "accuracy %", "products", "seconds"], cells)


def changed(run: dict, first: dict) -> str:
    """The flags of a run that the first of its table has not; all of them for that one."""
    same = {"pattern", "algo", "images"} if run == first else first.items()
    return ", ".join(f"`--{k} {v}`" for k, v in run.items() if k not in (*same, "pattern") and (k, v) not in same)


def vit_ablation() -> str:
    """One row per setting, with the accuracy at each pattern."""
    rows = load("vit_cifar10_ablation.json")["rows"]
    patterns = list(dict.fromkeys(row["run"]["pattern"] for row in rows))
    cells = {}
    for row in rows:
        first = next(each["run"] for each in rows if each["run"]["pattern"] == row["run"]["pattern"])
        cells.setdefault(changed(row["run"], first), {})[row["run"]["pattern"]] = row["accuracy"]
    lines = [[settings, *(found.get(pattern, "") for pattern in patterns)] for settings, found in cells.items()]
    return table(["settings", *(f"{pattern}, accuracy %" for pattern in patterns)], lines)


def end_to_end() -> str:
    """One row per method, in the order of their seconds."""
    rows = sorted(load("end_to_end_resnet20_cifar10.json")["rows"], key=lambda row: row["seconds"])
    cells = [
        [row["method"], row["accuracy"], f"{row['held_out_loss']:.3f}", round(row["products"]), f"{row['seconds']:.1f}"]
        for row in rows
    ]
    return table(["method", "accuracy %", "error of held-out logits", "products or gradients", "seconds"], cells)


def convergence() -> str:
    """One row per layer: loss and residual after few and many products, plain, preconditioned, in several steps."""
    columns = [("plain", 15), ("plain", 100), ("preconditioned", 5), ("preconditioned", 10), ("preconditioned", 15)]
    columns += [("several steps", 10), ("several steps", 15)]
    cells = []
    for network in ("resnet20_cifar10", "vit_cifar10"):
        rows = load(f"convergence_{network}.json")["rows"]
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
    slopes = load("scaling.json")["slopes"]
    cells = [[names[name], fits["seconds"], fits["peak_memory_bytes"]] for name, fits in slopes.items()]
    return table(["quantity", "exponent of the seconds", "exponent of the peak memory"], cells)


def vit() -> str:
    """One row per pattern: MP, MP+, SNOWS at each depth, and what share of the mask's loss of accuracy it recovers."""
    rows = load("vit_cifar10.json")["rows"]
    found = {(r["run"]["pattern"], r["run"]["algo"], r["run"].get("k_step")): r for r in rows}
    columns = {"MP (mask only)": ("MP", None), "MP+": ("MP+", None)}
    columns |= {f"SNOWS, K = {k}": ("SNOWS", k) for k in (0, 3, 8)}
    cells = []
    for pattern in dict.fromkeys(row["run"]["pattern"] for row in rows):
        runs = [found.get((pattern, *column)) for column in columns.values()]
        accuracies = ["" if run is None else run["accuracy"] for run in runs]
        mask = runs[0]
        lost, solved = mask["dense_accuracy"] - mask["accuracy"], [a for a in accuracies[2:] if a != ""]
        recovered = f"{(max(solved) - mask['accuracy']) / lost:.0%}" if solved else ""
        cells.append([pattern, f"{mask['sparsity']:.2%}", *accuracies, recovered])
    return table(["pattern", "zeros", *columns, "recovered"], cells)


def permuted() -> str:
    """One row per network and pattern: the magnitude kept, and the mean accuracy over the seeds, without and with."""
    cells = {}
    for row in load("permute.json")["rows"]:
        pair = cells.setdefault((row["network"], row["pattern"], row["layers_permuted"]), {False: [], True: []})
        pair[row["permuted"]].append(row)
    lines = []
    for (network, pattern, layers), (without, with_) in ((key, pair.values()) for key, pair in cells.items()):
        line = [f"`{network}`", pattern, layers]
        for figure, digits in (("kept", ".1%"), ("masked_accuracy", ".2f"), ("accuracy", ".2f")):
            line.append(" / ".join(format(mean(rows, figure), digits) for rows in (without, with_)))
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
        for row in load("imagenet_random_weights.json")["rows"]
    ]
    header = ["network", "layers whose loss fell", "median of loss after / before", "zeros", "seconds", "peak GiB"]
    return table(header, cells)


def products() -> str:
    """One row per network and curvature: what a product costs, in forward passes of its window."""
    kinds = {}
    for row in load("products.json")["rows"]:
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
        for row in load("checkpointing.json")["rows"]
    ]
    return table(["network", "layers written", "MiB written", "share of the run's time"], cells)


def memory() -> str:
    """One row per job and number of images: the host's peak before budgets held, and now."""
    rows = load("memory.json")["rows"]
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


TABLES = {
    "default": lambda: default("resnet20_digits.json"),
    "vit_default": lambda: default("vit_digits.json"),
    "accuracy": accuracy,
    "end_to_end": end_to_end,
    "convergence": convergence,
    "scaling": scaling,
    "ablation": ablation,
    "vit": vit,
    "vit_ablation": vit_ablation,
    "networks": networks,
    "compare_vit": lambda: markdown("compare_vit_2048.md"),
    "compare_2048": lambda: markdown("compare_resnet20_2048.md"),
    "permute": permuted,
    "products": products,
    "checkpointing": checkpointing,
    "memory": memory,
}


def fill(text: str) -> str:
    """The README with every block between `<!-- NAME -->` and `<!-- end -->` written anew."""

    def block(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
