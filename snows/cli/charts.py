"""The report's figures: each function draws one and returns it as SVG text for a page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snows.result import LayerRecord

DENSE, BEFORE, AFTER = "#8a94a0", "#dd9c3c", "#2463a6"  # the dense network; masked only; solved
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and a reader can search it
    "svg.hashsalt": "snows",  # the same figure is the same text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
WIDTH = 4.6  # inches, so that nine-point text can still be read on a phone
Records = Sequence[LayerRecord]


def draw(plot, height: float) -> str:
    """An SVG of a figure that `plot` draws on its axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        plot(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def accuracy(runs: dict[str, dict]) -> str:
    """Bars of the accuracies that the metrics of each run hold: dense, masked only, solved."""
    measured = [("dense", "dense_accuracy", DENSE), ("masked only", "masked_accuracy", BEFORE)]
    kinds = [*measured, ("solved", "accuracy", AFTER)]

    def plot(axes: Axes) -> None:
        for i, metrics in enumerate(runs.values()):
            for k, (label, key, color) in enumerate(kinds):
                if metrics.get(key) is not None:
                    y, value = i + (k - 1) * 0.27, metrics[key]
                    axes.barh(y, value, 0.25, color=color, label=label if i == 0 else None)
                    axes.annotate(f"{value:.2f}", (value, y), (3, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(runs)) if len(runs) > 1 else [], list(runs) if len(runs) > 1 else [])
        axes.set(xlim=(0, 112), xlabel="accuracy, % of the test images")
        axes.set_xticks(range(0, 101, 20))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)

    return draw(plot, 1.1 + 0.75 * len(runs))


def last_sweep(records: Records) -> list[LayerRecord]:
    """The last record of each layer by itself: one of all the layers together tells nothing of each."""
    alone = [record for record in records if not record.joint]
    return list({record.name: record for record in alone}.values())


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], label: str, log: bool = False) -> str:
    """Horizontal bars, one row per layer; several series share a row."""
    colors = [BEFORE, AFTER][-len(values) :]

    def plot(axes: Axes) -> None:
        width = 0.8 / len(values)
        for k, (series, heights) in enumerate(values.items()):
            rows = [i + (k - (len(values) - 1) / 2) * width for i in range(len(names))]
            axes.barh(rows, heights, width, color=colors[k], label=series)
        axes.set_yticks(range(len(names)), [name if len(name) < 27 else f"…{name[-25:]}" for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.grid(False, axis="y")
        if log:
            axes.set_xscale("log")
        if len(values) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)

    return draw(plot, 0.9 + 0.17 * len(names))


def sparsity(records: Records) -> str:
    layers = last_sweep(records)
    shares = [100 * layer.sparsity for layer in layers]
    return bars([layer.name for layer in layers], {"": shares}, "zeros, % of the layer's weights")


def losses(records: Records) -> str:
    """Loss before and after, where it is known and not zero (a logarithmic axis has no place for it)."""
    layers = [layer for layer in last_sweep(records) if layer.loss_before > 0 and layer.loss_after > 0]
    values = {"before": [layer.loss_before for layer in layers], "after": [layer.loss_after for layer in layers]}
    return bars([layer.name for layer in layers], values, "loss in the last sweep", log=True)


def totals(records: Records, field: str, label: str) -> str:
    """A field of the records, summed over the sweeps."""
    sums: dict[str, float] = {}
    for record in records:
        sums[record.name] = sums.get(record.name, 0) + getattr(record, field)
    return bars(list(sums), {"": list(sums.values())}, label)


def residuals(records: Records) -> str:
    """The relative residual of every CG solve, iteration by iteration, coloured by the layer's place in the network."""
    places = {name: i for i, name in enumerate(dict.fromkeys(record.name for record in records))}
    colors = matplotlib.colormaps["viridis"]

    def plot(axes: Axes) -> None:
        for record in records:
            for curve in record.residuals:
                color = colors(places[record.name] / max(1, len(places) - 1))
                axes.plot(range(len(curve) + 1), [1, *curve], color=color, linewidth=0.9, alpha=0.7)
        axes.set(yscale="log", xlabel="CG iterations", ylabel="relative residual")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, max(2, len(places))), colors)
        axes.figure.colorbar(scale, ax=axes, label="layer", ticks=matplotlib.ticker.MaxNLocator(6, integer=True))

    return draw(plot, 3.0)


def accuracy_by_layer(records: Records, metrics: dict) -> str:
    """The network's accuracy as it stood after each step, all sweeps in a row."""

    def plot(axes: Axes) -> None:
        values = [math.nan if record.accuracy is None else record.accuracy for record in records]
        axes.plot(range(1, len(values) + 1), values, color=AFTER, marker=".", label="so far")
        for label, key, color in (("dense", "dense_accuracy", DENSE), ("masked only", "masked_accuracy", BEFORE)):
            if metrics.get(key) is not None:
                axes.axhline(metrics[key], color=color, linestyle="--", label=label)
        axes.set(xlabel="finished layers, sweep after sweep", ylabel="accuracy, %")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)

    return draw(plot, 3.0)


def losses_of(runs: dict[str, Records]) -> str:
    """Loss after each layer in the last sweep of several runs."""

    def plot(axes: Axes) -> None:
        names = list(dict.fromkeys(record.name for records in runs.values() for record in records))
        for run, records in runs.items():
            found = {layer.name: layer.loss_after for layer in last_sweep(records)}
            axes.plot([found.get(name, math.nan) or math.nan for name in names], marker=".", linewidth=1, label=run)
        axes.set(yscale="log", xlabel="layer", ylabel="loss after, last sweep")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)

    return draw(plot, 3.0 + 0.2 * len(runs))
