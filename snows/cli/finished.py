"""A finished run, read back: what it says of itself, and the network that it pruned, made by its name or a factory."""

from __future__ import annotations

import importlib
import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from snows.cli import files
from snows.errors import UsageError, first_line
from snows.zoo.classifiers import Classifier
from snows.zoo.images import normalised
from snows.zoo.registry import Known, load_classifier


def add_run_flags(flags: ArgumentParser) -> None:
    """The flags of all commands that take a finished run."""
    flags.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of a finished run")
    flags.add_argument(
        "--factory", metavar="FILE.py:NAME", help="the function that makes the network, where it is one of your own"
    )


def read(folder: Path, metrics: Iterable[str] = (), arguments: Iterable[str] = ()) -> tuple[dict, Namespace]:
    """(metrics.json, args.json) of a finished run, which hold the names that are asked for.

    Raises:
        UsageError: they do not, or the run is not finished.
    """
    finished = files.read_json(folder / "metrics.json", "finished")["finished"]
    saved = Namespace(**files.read_json(folder / "args.json", "script", "arch", *arguments))
    if not finished:
        raise UsageError(f"{folder} is not finished: go on with {sys.executable} {saved.script} --resume {folder}")
    return files.read_json(folder / "metrics.json", *metrics), saved


def network_of(folder: Path, saved: Namespace, known: Known | None, factory: str | None) -> Classifier:
    """The network that a run pruned, without its weights.

    known: networks by name, besides those of libraries; None: those of the run's script. factory: see `built`.

    Raises:
        UsageError: it is not known by name.
    """
    if factory is not None:
        return built(factory)
    if known is None:
        known = known_of(saved.script)
    classes = getattr(saved, "num_classes", None)  # which runs of earlier versions do not have
    try:
        return load_classifier(saved.arch, known, random_weights=True, num_classes=classes)
    except UsageError as error:
        raise UsageError(
            f"the network '{saved.arch}' of {folder} is not known here: give the function that makes it, as "
            f"--factory FILE.py:NAME."
        ) from error


def built(factory: str) -> Classifier:
    """What a function of the user's makes: a network, for images between 0 and 1, or a Classifier with their transform.

    factory: FILE.py:NAME or MODULE:NAME, called without arguments.

    Raises:
        UsageError: it cannot be called, or makes something else.
    """
    where, _, name = factory.rpartition(":")
    try:
        names = names_in(Path(where)) if where.endswith(".py") else vars(importlib.import_module(where))
        made = names[name]()
    except Exception as error:  # whatever the user's code raises
        why = f"it has no {name}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"--factory {factory} cannot be called without arguments: {why}") from error
    if isinstance(made, nn.Module):
        return Classifier(made, normalised((0.0,), (1.0,)))
    if not isinstance(made, Classifier):
        raise UsageError(f"--factory {factory} makes a {type(made).__name__}, and neither a network nor a Classifier.")
    return made


def known_of(script: str) -> Known:
    """The networks that the script of a run knows, where its folder lies beside the package, as in a checkout."""
    utils = Path(__file__).resolve().parents[2] / Path(script).parent / "utils.py"
    return names_in(utils).get("KNOWN", {}) if utils.exists() else {}


def names_in(file: Path) -> dict[str, Any]:
    """What a file of Python defines; it imports what lies beside it, as a script does."""
    sys.path.insert(0, str(file.resolve().parent))
    return runpy.run_path(str(file))
