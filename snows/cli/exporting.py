"""A run's network as files for runtimes: the run folder read back, its exports made and checked, and what is said."""

from __future__ import annotations

import importlib
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from snows.cli import console, run_folder
from snows.cli.flags import add_how_flags, how
from snows.deploy.checks import Check, Logits
from snows.deploy.exports import EXPORTS, check_exports, export
from snows.deploy.product import How, Product
from snows.errors import UsageError, first_line
from snows.masks.patterns import NM
from snows.zoo.classifiers import Classifier, with_resize, with_statistics
from snows.zoo.evaluate import Batches, at_a_time
from snows.zoo.images import normalised
from snows.zoo.registry import Known, load_classifier, load_data

DESCRIPTION = "Files for runtimes from a finished run: python -m snows.export RUN_DIR --to onnx [--out FILE]."
FILE = "export.json"
FAR_FROM_RUN = 0.5  # percent points between a run's accuracy and the one measured here that call for a warning
SAVED = ["script", "arch", "dset", "num_classes", "mean", "std", "resize", "classes", "skip_broken", "num_workers"]
SAVED += ["ngrads", "mirror", "seed", "test_batch_size", "layer_sparsity"]


def main() -> None:
    """python -m snows.export: the exports of a finished run.

    Raises:
        UsageError: flags contradict each other.
    """
    flags = ArgumentParser(prog="python -m snows.export", description=DESCRIPTION)
    flags.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of a finished run")
    flags.add_argument("--to", nargs="+", required=True, choices=EXPORTS, help="what to make of its network")
    flags.add_argument("--out", type=Path, help="where it goes (default: into RUN_DIR); with a single --to")
    flags.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    flags.add_argument(
        "--factory", metavar="FILE.py:NAME", help="the function that makes the network, where it is one of your own"
    )
    add_how_flags(flags)
    args = flags.parse_args()
    if args.out is not None and len(args.to) > 1:
        raise UsageError("--out is for a single --to.")
    check_exports(args.to, how(args))
    known = {} if args.factory else known_of(args.run)
    with run_folder.locked(args.run):
        export_run(args.run, tuple(args.to), how(args), known, args.data_dir, args.out, args.factory)


def export_run(
    folder: Path,
    names: tuple[str, ...],
    choices: How,
    known: Known,
    data_dir: Path,
    out: Path | None = None,
    factory: str | None = None,
) -> None:
    """Export a finished run's network, into its folder or to `out`; says what each file holds, and keeps it in a file.

    known: networks by name, besides torchvision's and timm's. factory: see `built`.

    Raises:
        UsageError: the run is not finished, its network not known, or an export cannot be.
        SnowsError: an export would not be what was pruned.
    """
    product, accuracy = product_of(folder, known, data_dir, factory)
    before = Logits(product.model, product)
    warn_if_other(before.accuracy, accuracy)
    kept = run_folder.read_json(folder / FILE) if (folder / FILE).exists() else {}
    print(f"exports, each read back and beside the pruned network in PyTorch:\n{heading(product.pattern)}", flush=True)
    for name in names:
        file = out or folder / EXPORTS[name].file
        found = export(product, name, file, choices, before)
        kept[name] = {"file": str(file), "half": choices.half, **asdict(found)}
        run_folder.write_json(folder / FILE, kept)
        print(line(name, found), flush=True)


def product_of(folder: Path, known: Known, data_dir: Path, factory: str | None) -> tuple[Product, float | None]:
    """(a finished run's network with its masks and images, the accuracy that the run measured).

    Raises:
        UsageError: the run is not finished, or its network not known.
    """
    metrics = run_folder.read_json(folder / "metrics.json", "finished", "pattern", "accuracy", "test_images")
    saved = Namespace(**run_folder.read_json(folder / "args.json", *SAVED))
    if not metrics["finished"]:
        raise UsageError(f"{folder} is not finished: go on with python {saved.script} --resume {folder}")
    classifier = network_of(folder, saved, known, factory)
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
    card = card_of(metrics, run_folder.read_json(folder / "environment.json", "command"))
    return Product(model, masks, test, lambda: images()[0], pattern, card), metrics["accuracy"]


def network_of(folder: Path, saved: Namespace, known: Known, factory: str | None) -> Classifier:
    """The network that a run pruned, without its weights, and the transform of its images.

    Raises:
        UsageError: it is not known by name.
    """
    if factory is not None:
        classifier = built(factory)
    else:
        try:
            classifier = load_classifier(saved.arch, known, random_weights=True, num_classes=saved.num_classes)
        except UsageError as error:
            raise UsageError(
                f"the network '{saved.arch}' of {folder} is not known here: give the function that makes it, as "
                f"--factory FILE.py:NAME."
            ) from error
    classifier.transform = with_statistics(classifier.transform, saved.mean, saved.std)
    classifier.transform = with_resize(classifier.transform, saved.resize)
    return classifier


def built(factory: str) -> Classifier:
    """What a function of the user's makes: a network, for images between 0 and 1, or a Classifier with their transform.

    factory: FILE.py:NAME or MODULE:NAME, called without arguments.

    Raises:
        UsageError: it cannot be called, or makes something else.
    """
    where, _, name = factory.rpartition(":")
    try:
        names = runpy.run_path(where) if where.endswith(".py") else vars(importlib.import_module(where))
        made = names[name]()
    except Exception as error:  # whatever the user's code raises
        why = f"it has no {name}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"--factory {factory} cannot be called without arguments: {why}") from error
    if isinstance(made, nn.Module):
        return Classifier(made, normalised((0.0,), (1.0,)))
    if not isinstance(made, Classifier):
        raise UsageError(f"--factory {factory} makes a {type(made).__name__}, and neither a network nor a Classifier.")
    return made


def known_of(folder: Path) -> Known:
    """The networks that the script of a run knows, where its folder lies beside the package, as in a checkout."""
    saved = run_folder.read_json(folder / "args.json", "script")
    utils = Path(__file__).resolve().parents[2] / Path(saved["script"]).parent / "utils.py"
    if not utils.exists():
        return {}
    sys.path.insert(0, str(utils.parent))
    return runpy.run_path(str(utils)).get("KNOWN", {})


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


ROW: Callable[..., str] = "  {:<8} {:>14} {:>16} {:>12} {:>23} {:>12} {:>14} {:>14}".format


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
