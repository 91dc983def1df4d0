"""The tables of docs/export.md and docs/deployment.md: what exports hold, and how long networks take."""

import re
from collections.abc import Callable

from cells import load, table

KINDS = [("onnx", ""), ("pt2", ""), ("timm", ""), ("packed", ""), ("onnx", "--half"), ("int8", "")]  # of exports.py


def exported() -> dict[tuple[str, str], dict[tuple[str, str], dict]]:
    """The rows of exports.csv: of each network and pattern, of each export and its flags."""
    found: dict = {}
    for row in load("exports"):
        found.setdefault((row["network"], row["pattern"]), {})[row["export"], row["flags"] or ""] = row
    return found


def export_table(cell: Callable[[dict], str], *more: Callable[[dict], str]) -> str:
    """One row per network and pattern, a column per export; `cell` makes what stands there of a row of exports.csv.

    more: columns before these, from all the rows that were made; their docstrings are their names.
    """
    lines = []
    for (network, pattern), by_kind in exported().items():
        made = {kind: row for kind, row in by_kind.items() if row["bytes"] is not None}
        cells = [cell(made[kind]) if kind in made else "-" for kind in KINDS]
        lines.append([network, pattern, *(column(made) for column in more), *cells])
    heads = [f"{name} {flags}".strip() for name, flags in KINDS]
    return table(["network", "pattern", *(column.__doc__ for column in more), *heads], lines)


def exports() -> str:
    """Beside the network in PyTorch: the largest difference of a logit, the images with the same class, zeros, N:M."""

    def zeros(made: dict) -> str:
        """zeros found of asked"""
        (counts,) = {(row["zeros_found"], row["zeros_asked"]) for row in made.values()}
        return "{:,} of {:,}".format(*counts)

    def layers(made: dict) -> str:
        """N:M layers"""
        (counts,) = {(row["nm_layers"], row["layers"]) for row in made.values()}
        return "-" if counts[0] is None else "{} of {}".format(*counts)

    def cell(row: dict) -> str:
        return f"{row['largest_difference']:.1g}, {row['same_class']:,}/{row['images']:,}"

    return export_table(cell, zeros, layers)


def export_sizes() -> str:
    """Megabytes of each export, and with zstandard."""

    def tensors(made: dict) -> str:
        """all tensors"""
        return f"{next(iter(made.values()))['bytes_of_tensors'] / 1e6:.2f}"

    return export_table(lambda row: f"{row['bytes'] / 1e6:.2f} ({row['zstd_bytes'] / 1e6:.2f})", tensors)


def int8() -> str:
    """The accuracy before and after, by NNCF's own defaults and with the first convolutions in float."""
    lines = []
    for (network, pattern), by_kind in exported().items():
        ways = [by_kind.get(("int8", flags)) for flags in ("--int8_float none", "")]
        known = next((row for row in by_kind.values() if row["accuracy_before"] is not None), None)
        if known is not None and None not in ways:
            cells = [row["accuracy"] if row["bytes"] is not None else f"refused: {lost(row)}" for row in ways]
            lines.append([network, pattern, known["accuracy_before"], *cells])
    return table(["network", "pattern", "float", "all in int8, NNCF's defaults", "first convolutions in float"], lines)


def lost(row: dict) -> str:
    """The accuracy that int8 was refused for."""
    return re.search(r"to ([\d.]+) %", row["refused"])[1]


def latency() -> str:
    """One row per network and backend: the CPU's time with each pattern; one of multiply-accumulates a network."""
    rows = load("latency")
    if not rows:
        return "Not measured yet."
    patterns, lines = list(dict.fromkeys(row["pattern"] for row in rows)), []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        macs = {row["pattern"]: f"{row['macs'] / 1e9:.3g}" for row in own}
        lines.append([f"`{network}`", "10⁹ MACs", *(macs.get(pattern, "") for pattern in patterns)])
        for backend in dict.fromkeys(row["backend"] for row in own):
            times = {row["pattern"]: row["cpu_ms"] for row in own if row["backend"] == backend}
            cells = ["-" if times.get(pattern) is None else f"{times[pattern]:.3g}" for pattern in patterns]
            lines.append(["", backend, *cells])
    return table(["network", "", *patterns], lines)
