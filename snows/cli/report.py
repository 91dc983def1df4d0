"""A page that shows how a run went, or how several compare: one file that needs nothing besides itself.

    python -m snows.report RUN_DIR [RUN_DIR ...] [--out FILE]

With one run folder it writes report.html into it, as every run does at its end; with several, comparison.html.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from snows.cli import charts
from snows.cli.console import percent
from snows.cli.files import read_json, write
from snows.cli.flags import as_flags
from snows.cli.journal import Journal
from snows.errors import UsageError
from snows.result import LayerRecord, problems

STYLE = """
:root { color: #1c2733; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-top: 1px solid #d5dbe1; padding-top: 1rem; }
h2.run { font-size: 1.35rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; margin: .5rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e6eaee; vertical-align: top; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide td, .wide th { white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
.problem { color: #a3341f; }
"""


@dataclass
class Run:
    """What a run folder says of its run, finished or not."""

    name: str
    metrics: dict
    arguments: dict
    environment: dict
    layers: list[LayerRecord]
    latency: dict | None = None  # what `python -m snows.measure` left

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises: UsageError: the folder holds no run, or a damaged one."""
        metrics = read_json(folder / "metrics.json", "arch", "dset", "pattern", "algo", "seed", "finished")
        arguments, environment = (
            read_json(folder / "args.json", "argv"),
            read_json(folder / "environment.json", "torch"),
        )
        if metrics["finished"]:
            layers = [layer_record(folder, values) for values in read_json(folder / "layers.json")]
        else:
            layers = [step.record for step in Journal(folder)]
        file = folder / "latency.json"
        measured = read_json(file, "rows", "threads", "runs", "batch_size", "said") if file.exists() else None
        return cls(folder.resolve().name, metrics, arguments, environment, layers, measured)


def layer_record(folder: Path, values: dict) -> LayerRecord:
    try:
        return LayerRecord.of(values)
    except (TypeError, KeyError) as error:
        raise UsageError(f"{folder} holds no run that can be read: layers.json: {error}") from error


def page(runs: list[Run]) -> str:
    """The report of one run, or the comparison of several, as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = comparison(runs) if len(runs) > 1 else ""
    for run in runs:
        body += (f'<h2 class="run">{escape(run.name)}</h2>' if len(runs) > 1 else "") + report(run)
    head = f"<title>SNOWS: {escape(title)}</title><style>{STYLE}</style>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{head}'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n'
    )


def report(run: Run) -> str:
    """All there is to see of one run."""
    metrics, layers = run.metrics, run.layers
    parts = [f"<p>{escape(sentence(run))}</p>", unsolved(layers), '<div class="charts">']
    if metrics.get("dense_accuracy") is not None:
        parts += [figure("Accuracy", charts.accuracy({run.name: metrics}))]
    if any(layer.accuracy is not None for layer in layers):
        parts += [figure("Accuracy after each layer", charts.accuracy_by_layer(layers, metrics))]
    if any(layer.residuals for layer in layers):
        parts += [figure("Conjugate gradients", charts.residuals(layers))]
    parts += ["</div>", "<h2>Layers</h2>", '<div class="charts">']
    if layers:
        parts += [figure("Sparsity", charts.sparsity(layers))]
    if any(layer.products for layer in layers):
        parts += [
            figure("Loss", charts.losses(layers)),
            figure("Products", charts.totals(layers, "products", "curvature products, all sweeps")),
            figure("Time", charts.totals(layers, "seconds", "seconds, all sweeps")),
        ]
    parts += ["</div>", latency(run.latency), details("Left dense", metrics.get("left_dense", {}))]
    parts += [details("Settings", {k: v for k, v in run.arguments.items() if k != "argv"})]
    parts += [details("Environment", run.environment)]
    return "\n".join(parts)


def sentence(run: Run) -> str:
    """What was run, and how far it came."""
    m = run.metrics
    text = f"{m['arch']} on {m['dset']}, {m['pattern']}, {m['algo']}, seed {m['seed']}. "
    if not m["finished"]:
        return text + f"Not finished: {len(run.layers)} layers so far."
    return text + (
        f"Accuracy {percent(m['accuracy'])}, dense {percent(m['dense_accuracy'])}; {m['sparsity']:.2%} of all "
        f"parameters are zero. {m['curvature_products']:.0f} curvature products, {m['seconds']:.0f} s."
    )


def latency(measured: dict | None) -> str:
    """What dense and pruned take on each backend, and what zeros did there; nothing where it was not measured."""
    if measured is None:
        return ""
    how = "{batch_size} image(s), {threads} thread(s), least of {runs} passes in turn, in milliseconds.".format(
        **measured
    )
    header = ["backend", "network", "wall", "CPU", "median wall", "median CPU", "not measured because"]
    names = ["backend", "network", "wall_ms", "cpu_ms", "median_wall_ms", "median_cpu_ms", "problem"]
    rows = [[show(row.get(name)) for name in names] for row in measured["rows"]]
    said = f"<p>{escape(measured['said'])} {escape(how)}</p>"
    return f"<h2>Latency</h2>{said}{table(header, rows)}"


def unsolved(layers: list[LayerRecord]) -> str:
    """The layers that were not solved."""
    lines = [f"<li>{escape(name)}: {escape(as_flags(problem))}</li>" for name, problem in problems(layers).items()]
    return f'<div class="problem">Not solved, weights as they were:<ul>{"".join(lines)}</ul></div>' if lines else ""


def comparison(runs: list[Run]) -> str:
    """What several runs reached, side by side, and the settings in which they differ."""
    names = ["pattern", "algo", "seed", "dense_accuracy", "masked_accuracy", "accuracy", "sparsity"]
    names += ["curvature_products", "seconds"]
    rows = [[run.name, *(show(run.metrics.get(name)) for name in names)] for run in runs]
    keys = dict.fromkeys(key for run in runs for key in run.arguments if key not in ("argv", "seed", "algo"))
    differing = [key for key in keys if len({str(run.arguments.get(key)) for run in runs}) > 1]
    settings = [[key, *(show(run.arguments.get(key)) for run in runs)] for key in differing]
    labels = unique([run.name for run in runs])
    parts = [table(["run", *(name.replace("_", " ") for name in names)], rows), '<div class="charts">']
    if any(run.metrics.get("dense_accuracy") is not None for run in runs):
        parts += [figure("Accuracy", charts.accuracy(dict(zip(labels, (run.metrics for run in runs)))))]
    if any(layer.products for run in runs for layer in run.layers):
        parts += [figure("Loss", charts.losses_of(dict(zip(labels, (run.layers for run in runs)))))]
    parts += ["</div>"]
    if settings:
        parts += ["<h2>Settings that differ</h2>", table(["setting", *labels], settings)]
    return "\n".join(parts)


def unique(names: list[str]) -> list[str]:
    """The names, numbered where two folders share one."""
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def details(title: str, values: dict) -> str:
    """Names and values, folded away."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(show(value))}</td></tr>" for key, value in values.items())
    return f"<details><summary>{escape(title)}</summary><table>{rows}</table></details>" if rows else ""


def show(value: object) -> str:
    """A value as a reader wants it."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write_report(folders: list[Path], out: Path) -> None:
    """Write the page of these run folders.

    Raises:
        UsageError: one of them holds no run. WriteError: the page cannot be written.
    """
    write(out, page([Run.read(folder) for folder in folders]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html, or comparison.html)")
    args = parser.parse_args()
    alone = args.folders[0] / "report.html" if len(args.folders) == 1 else Path("comparison.html")
    out = args.out or alone
    write_report(args.folders, out)
    print(out)


if __name__ == "__main__":
    from snows.cli.shell import shell

    shell(main)
