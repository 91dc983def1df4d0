"""What the tables share: Markdown, means over seeds, and rows found by what they are of."""

import itertools
from statistics import mean, stdev

from common import RESULTS, read

PATTERNS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "1:4", "2:8")  # of compare.py, in their usual order, as are these
MASKS = ("MP", "Wanda", "SparseGPT", "OBS")
WAYS = ("alone", "MP+", "SNOWS")


def load(name: str) -> list[dict]:
    """The rows of a results file."""
    return read(RESULTS / f"{name}.csv")


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; floats with two digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in line) + " |" for line in lines
    )


def average(rows: list[dict], figure: str) -> float | str:
    """The mean of a figure; nothing where there is no row."""
    return mean(row[figure] for row in rows) if rows else ""


def spread(rows: list[dict]) -> str:
    """The mean accuracy of some seeds, with the lowest, the highest and how many there are."""
    found = [row["accuracy"] for row in rows]
    if len(found) < 2:
        return "".join(f"{each:.2f}" for each in found)
    return f"{sum(found) / len(found):.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)} seeds)"


def deviation(accuracies: list[float]) -> str:
    """A mean and, of several, the standard deviation."""
    if not accuracies:
        return ""
    return f"{mean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else "")


def over_seeds(rows: list[dict], **wanted) -> list[float]:
    """The accuracies of all the seeds of one cell."""
    return [row["accuracy"] for row in rows if wanted.items() <= row.items()]


def found(rows: list[dict], key: str, order: tuple[str, ...]) -> list[str]:
    """The values that the rows have, known ones in their usual order and first."""
    values = {row[key] for row in rows}
    return [value for value in order if value in values] + sorted(values - set(order))


def flags(row: dict) -> list[str]:
    """A row of cifar10.py as flags: the number of images first."""
    return [f"--images {row['images']}", *(f"--{flag.strip()}" for flag in row["flags"].split("--")[1:])]


def quoted(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def changed(row: dict, first: dict) -> str:
    """The flags of a row that the first of its table has not; for that one, all of them but the images."""
    return quoted(flags(row)[1:] if row is first else [flag for flag in flags(row) if flag not in flags(first)])


def seconds_of(row: dict) -> float:
    """A row's seconds of the processor; earlier rows have those of the clock alone."""
    return row.get("cpu_seconds") or row["seconds"]


def training_of(row: dict) -> tuple:
    """What the learning rates of end_to_end.py are tried for, each time anew."""
    return tuple(row.get(name) for name in ("network", "images", "method", "pattern", "budget"))


def chosen_rates(rows: list[dict]) -> dict[tuple, float]:
    """Of each training the learning rate whose error on held-out training images is least, with its first seed."""
    tried: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("lr") is not None and row["held_out_error"] is not None:
            tried.setdefault(training_of(row), []).append(row)
    best = {name: min(each, key=lambda row: (row["seed"], row["held_out_error"])) for name, each in tried.items()}
    return {name: row["lr"] for name, row in best.items()}


def of_chosen_rates(rows: list[dict]) -> list[dict]:
    """The rows without the trainings at other learning rates than the chosen."""
    best = chosen_rates(rows)
    return [row for row in rows if row.get("lr") is None or row["lr"] == best.get(training_of(row))]


def reached(rows: list[dict]) -> str:
    """Accuracy, error on held-out images and seconds, means over the seeds; "-" where a training has diverged."""
    if not rows:
        return ""
    errors = [row["held_out_error"] for row in rows]
    error = "-" if None in errors else f"{mean(errors):.4f}"
    return f"{deviation([row['accuracy'] for row in rows])} / {error} / {mean(map(seconds_of, rows)):.0f}"


def comparison(rows: list[dict]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds: a line for each mask of each pattern."""
    ways, lines = found(rows, "way", WAYS), []
    for pattern, mask in itertools.product(found(rows, "pattern", PATTERNS), found(rows, "mask", MASKS)):
        cells = [over_seeds(rows, pattern=pattern, mask=mask, way=way) for way in ways]
        if any(cells):
            lines.append([pattern, mask, *map(deviation, cells)])
    return table(["pattern", "mask", *ways], lines)
