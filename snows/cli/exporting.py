"""A finished run's network as files for runtimes: its exports made and checked, and what is said of them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from snows.cli import console, files, finished, run_folder
from snows.cli.flags import add_how_flags, how
from snows.deploy.checks import Check, Logits
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.exports import EXPORTS, check_exports, check_place, export
from snows.errors import UsageError
from snows.masks.patterns import NM
from snows.zoo.evaluate import Batches, at_a_time
from snows.zoo.registry import Known, load_data

DESCRIPTION = "Files for runtimes from a finished run: python -m snows.export RUN_DIR --to onnx [--out FILE]."
FILE = "export.json"
FAR_FROM_RUN = 0.5  # percent points between a run's accuracy and the one measured here that call for a warning
MEASURED = ["pattern", "accuracy", "test_images"]
SAVED = ["dset", "num_classes", "mean", "std", "resize", "classes", "skip_broken", "num_workers"]
SAVED += ["ngrads", "mirror", "seed", "test_batch_size", "layer_sparsity"]


def main() -> None:
    """python -m snows.export: the exports of a finished run.

    Raises:
        UsageError: flags contradict each other.
    """
    flags = ArgumentParser(prog="python -m snows.export", description=DESCRIPTION)
    finished.add_run_flags(flags)
    flags.add_argument("--to", nargs="+", required=True, choices=EXPORTS, help="what to make of its network")
    flags.add_argument("--out", type=Path, help="where it goes (default: into RUN_DIR); with a single --to")
    flags.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    add_how_flags(flags)
    args = flags.parse_args()
    if args.out is not None and len(args.to) > 1:
        raise UsageError("--out is for a single --to.")
    check_exports(args.to, how(args))
    finished.read(args.run, MEASURED, SAVED)  # a folder that is none cannot be locked
    with run_folder.locked(args.run):
        export_run(args.run, tuple(args.to), how(args), None, args.data_dir, args.out, args.factory)


def export_run(
    folder: Path,
    names: tuple[str, ...],
    choices: ExportOptions,
    known: Known | None,
    data_dir: Path,
    out: Path | None = None,
    factory: str | None = None,
) -> None:
    """Export a finished run's network, into its folder or to `out`; says what each file holds, and keeps it in a file.

    known: networks by name, besides those of libraries; None: those of the run's script. factory: see
        `finished.built`.

    Raises:
        UsageError: the run is not finished, its network not known, or an export cannot be.
        SnowsError: an export would not be what was pruned.
    """
    places = {name: out or folder / EXPORTS[name].file for name in names}
    for name, file in places.items():
        check_place(name, file)
    deployable, accuracy = deployable_of(folder, known, data_dir, factory)
    before = Logits(deployable.model, deployable)
    warn_if_other(before.accuracy, accuracy)
    kept = files.read_json(folder / FILE) if (folder / FILE).exists() else {}
    print(
        f"exports, each read back and beside the pruned network in PyTorch:\n{heading(deployable.pattern)}", flush=True
    )
    for name, file in places.items():
        found = export(deployable, name, file, choices, before)
        kept[name] = {"file": str(file), "half": choices.half, **asdict(found)}
        files.write_json(folder / FILE, kept)
        print(line(name, found), flush=True)


def deployable_of(
    folder: Path, known: Known | None, data_dir: Path, factory: str | None
) -> tuple[Deployable, float | None]:
    """(a finished run's network with its masks and images, the accuracy that the run measured).

    Raises:
        UsageError: the run is not finished, or its network not known.
    """
    metrics, saved = finished.read(folder, MEASURED, SAVED)
    classifier = finished.network_of(folder, saved, known, factory).adapted(saved.mean, saved.std, saved.resize)
    model, masks = run_folder.load(folder, classifier.model)
    model.eval().requires_grad_(False)
    data = load_data(
        *(saved.arch, classifier, saved.dset, data_dir, saved.num_workers),
        None if saved.classes is None else Path(saved.classes),
        saved.skip_broken,
    )

    def test() -> Batches:
        return data.test_batches(min(saved.test_batch_size, at_a_time(data.test[0][0])))

    config = getattr(model, "pretrained_cfg", None)
    if config and saved.mean:
        model.pretrained_cfg = {**config, "mean": saved.mean, "std": saved.std}  # as the folder for timm tells it
    pattern = NM(saved.NM_N, saved.NM_M, saved.layer_sparsity) if hasattr(saved, "NM_N") else None
    images = partial(data.calibration, saved.ngrads, saved.seed, saved.mirror)
    card = card_of(metrics, files.read_json(folder / "environment.json", "command"))
    return Deployable(model, masks, test, lambda: images()[0], pattern, card), metrics["accuracy"]


def card_of(metrics: dict, environment: dict) -> dict[str, str]:
    """What a model card says of a run."""
    dense, own = (console.percent(metrics[name]) for name in ("dense_accuracy", "accuracy"))
    return {
        "network": metrics["arch"],
        "data": f"{metrics['dset']}, {metrics['calibration_images']} images for calibration",
        "pattern": f"{metrics['pattern']}, {metrics['sparsity']:.1%} of all parameters are zero",
        "method": metrics["algo"],
        "accuracy": f"{own} on {metrics['test_images']} test images (before pruning: {dense})",
        "command": f"`python {environment['command']}`",
    }


def warn_if_other(measured: float | None, run: float | None) -> None:
    """Warn where the network does not do what the run said: its images, or their transform, are others here."""
    if measured is not None and run is not None and abs(measured - run) > FAR_FROM_RUN:
        print(
            f"warning: the run measured an accuracy of {run:.2f} %, and here it is {measured:.2f} %: the test images "
            f"or their transform are others.",
            file=sys.stderr,
        )


ROW: Callable[..., str] = "  {:<12} {:>14} {:>16} {:>12} {:>23} {:>12} {:>14} {:>14}".format


def heading(pattern: NM | None) -> str:
    """The names of the table's columns."""
    layers = "layers" if pattern is None else f"{pattern.n}:{pattern.m} layers"
    return ROW("", "logits differ", "same class", "accuracy", "zeros, asked = found", layers, "bytes", "with zstd")


def line(name: str, found: Check) -> str:
    """What an export's check found."""
    kept = found.layers if found.nm_layers is None else f"{found.nm_layers} of {found.layers}"
    return ROW(
        name,
        f"{found.largest_difference:.2g}",
        f"{found.same_class} of {found.images}",
        console.percent(found.accuracy),
        f"{found.zeros_asked:,} = {found.zeros_found:,}",
        kept,
        f"{found.bytes:,}",
        "" if found.zstd_bytes is None else f"{found.zstd_bytes:,}",
    )
