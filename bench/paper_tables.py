"""The tables of bench/paper.py in Markdown and LaTeX, and its plots: a row per pattern, a column per method."""

from collections.abc import Iterator
from statistics import mean

from cells import deviation, found, over_seeds, table
from common import panels

PATTERNS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "1:4", "4:8")


def by_network(rows: list[dict], titles: dict[str, str]) -> Iterator[tuple[str, list[dict]]]:
    """(title, rows) of each network and number of images, in the titles' order."""
    for network in found(rows, "network", tuple(titles)):
        of_it = [row for row in rows if row["network"] == network]
        for images in sorted({row["images"] for row in of_it}):
            yield f"{titles.get(network, network)}, {images:,} images", [r for r in of_it if r["images"] == images]


def cells_of(rows: list[dict], methods: tuple[str, ...]) -> tuple[list[str], list[tuple[str, list[list[float]]]]]:
    """(the methods that there are, (pattern, each method's accuracies over the seeds) of each pattern)"""
    shown = found(rows, "method", methods)
    patterns = found(rows, "pattern", PATTERNS)
    return shown, [(p, [over_seeds(rows, pattern=p, method=method) for method in shown]) for p in patterns]


def dense(rows: list[dict]) -> str:
    return f"{rows[0]['dense_accuracy']:.2f}"


def markdown(rows: list[dict], titles: dict[str, str], methods: tuple[str, ...]) -> str:
    """A table for each network: accuracy in percent, mean and standard deviation over the seeds."""
    parts = []
    for title, of_it in by_network(rows, titles):
        shown, lines = cells_of(of_it, methods)
        written = table(["pattern", *shown], [[pattern, *map(deviation, cells)] for pattern, cells in lines])
        parts.append(f"## {title}\n\nDense: {dense(of_it)}.\n\n{written}\n")
    return "\n".join(parts)


def latex(rows: list[dict], titles: dict[str, str], methods: tuple[str, ...]) -> str:
    """The same for a paper (package booktabs), the best mean of each row in bold."""
    parts = []
    for title, of_it in by_network(rows, titles):
        shown, lines = cells_of(of_it, methods)
        body = []
        for pattern, cells in lines:
            best = max(mean(each) for each in cells if each)
            written = [latex_cell(each, bold=bool(each) and mean(each) == best) for each in cells]
            body.append(" & ".join([pattern, *written]) + r" \\")
        head = " & ".join(["Pattern", *map(escaped, shown)]) + r" \\"
        caption = rf"\caption{{{escaped(title)} (dense: {dense(of_it)}). Accuracy in percent.}}"
        begin = [r"\begin{table}", r"\centering", caption, rf"\begin{{tabular}}{{l{'r' * len(shown)}}}", r"\toprule"]
        end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
        parts.append("\n".join([*begin, head, r"\midrule", *body, *end]))
    return "\n".join(parts)


def latex_cell(accuracies: list[float], bold: bool) -> str:
    text = deviation(accuracies).replace(" ± ", r" \pm ")
    return f"$\\mathbf{{{text}}}$" if bold else f"${text}$" if text else ""


def escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "%&_#$" else letter for letter in text)


def plot(rows: list[dict], titles: dict[str, str], methods: tuple[str, ...]):
    """Accuracy over the share of all parameters that are zero: sparsities joined by lines, N:M patterns as points."""
    parts = list(by_network(rows, titles))
    figure, axes = panels(len(parts), 1, 8, 3.2 * len(parts))
    for (title, of_it), panel in zip(parts, axes[:, 0]):
        for i, method in enumerate(found(of_it, "method", methods)):
            for nm, look in ((False, f"C{i}.-"), (True, f"C{i}D")):
                patterns = [p for p in found(of_it, "pattern", PATTERNS) if (":" in p) == nm]
                points = [point(of_it, pattern, method) for pattern in patterns]
                label = method if not nm else None
                panel.plot(*zip(*filter(None, points)), look, markersize=5, label=label) if any(points) else None
        panel.axhline(of_it[0]["dense_accuracy"], color="black", linewidth=0.8, label="dense")
        panel.set(title=title, xlabel="zeros, % of all parameters", ylabel="accuracy, %")
        panel.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def point(rows: list[dict], pattern: str, method: str) -> tuple[float, float] | None:
    """(percent of zeros, mean accuracy) of one cell; None: it has no row."""
    cell = [row for row in rows if (row["pattern"], row["method"]) == (pattern, method)]
    return (100 * cell[0]["sparsity"], mean(row["accuracy"] for row in cell)) if cell else None
