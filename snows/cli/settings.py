"""What one command does: its flags, read once, every default resolved. Nothing changes it afterwards."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from snows.cli.option_flags import options_of
from snows.deploy.deployable import ExportOptions
from snows.errors import UsageError
from snows.masks.patterns import Pattern
from snows.options import Options
from snows.zoo.registry import default_dataset

PatternOf = Callable[[argparse.Namespace], Pattern]  # builds the pattern that a script's flags ask for
# Flags that have no bearing on a run's result, and are what each command says.
NO_BEARING = {"resume", "out_dir", "data_dir", "verbose", "quiet", "evaluate_layers", "export_masks"}
NO_BEARING |= {"default_sparsity", "export", *vars(ExportOptions())}


@dataclass(frozen=True)
class RunSettings:
    """The settings of one command. What holds a flag has its name; `from_flags` makes them, `resumed` for --resume."""

    # the network and its images
    arch: str
    checkpoint: Path | None
    checkpoint_key: str | None
    random_weights: bool
    num_classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    dset: str
    classes: Path | None
    resize: int | None
    skip_broken: bool
    data_dir: Path
    ngrads: int
    mirror: bool
    test_batch_size: int
    num_workers: int
    # the masks
    pattern: Pattern
    permute: bool
    mask_alg: str
    masks: Path | None
    keep_zeros: bool
    export_masks: Path | None
    skip: tuple[str, ...]
    # the runs
    algo: tuple[str, ...]
    seed: tuple[int, ...]
    options: Options  # with the command's first seed, which random weights are drawn with, whichever run it is
    device: str
    deterministic: bool
    skip_evaluation: bool
    evaluate_layers: bool
    out_dir: Path | None
    resume: Path | None
    verbose: bool
    quiet: bool
    # the exports
    export: tuple[str, ...]
    half: bool
    int8_tolerance: float
    int8_float: tuple[str, ...]
    # what args.json says of it
    flags: Mapping[str, Any]  # all that bears on the results, a script's own flags too, as JSON holds it
    argv: tuple[str, ...]  # of the command that a run began with
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # by --resume: flag -> (before, now)
    resumes: tuple[dict, ...] = ()  # what earlier commands with --resume changed

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(algorithm, seed) of each run, each once; those of one seed together, for they share its images."""
        return list(dict.fromkeys((algo, seed) for seed, algo in itertools.product(self.seed, self.algo)))

    @property
    def how(self) -> ExportOptions:
        """The choices that exports leave."""
        return ExportOptions(**{each.name: getattr(self, each.name) for each in fields(ExportOptions)})

    @property
    def style(self) -> str:
        """How much is said of each layer, as `console.Progress` takes it."""
        return "quiet" if self.quiet else "verbose" if self.verbose else ""

    def options_of(self, seed: int) -> Options:
        """The options of the run with that seed."""
        return self.options.but(seed=seed)

    def needs_images(self, algo: str) -> bool:
        """Whether a run looks at calibration images: magnitude alone needs none."""
        return not algo == self.mask_alg == "MP"


def from_flags(args: argparse.Namespace, pattern_of: PatternOf, argv: Sequence[str]) -> RunSettings:
    """The settings that parsed flags ask for.

    Raises:
        UsageError: a value outside its range.
    """
    pattern, chosen = pattern_of(args), options_of(args, args.seed[0])
    resolved = {**vars(chosen), **vars(args)}
    resolved["dset"] = default_dataset(args.arch) if args.dset is None else args.dset
    resolved |= {name: value for name, value in vars(pattern).items() if name in resolved}
    bearing = {name: value for name, value in resolved.items() if name not in NO_BEARING}
    own = {f.name: resolved[f.name] for f in fields(RunSettings) if f.name in resolved}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    return RunSettings(
        **{"permute": False, **own},  # which is a flag of N:M alone
        pattern=pattern,
        options=chosen,
        flags=MappingProxyType(json.loads(json.dumps(bearing, default=str))),
        argv=tuple(argv),
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, and those of exports where there is none.

    Raises:
        UsageError: it names them.
    """
    check_mask_flags(args)
    of_exports = [
        f"--{each.name}" for each in fields(ExportOptions) if getattr(args, each.name) not in (each.default, [])
    ]
    if of_exports and not args.export:
        raise UsageError(f"{' and '.join(of_exports)} without --export: name the files to make, or leave it out.")


def check_mask_flags(args: argparse.Namespace) -> None:
    choices = {"mask_alg": "MP", "permute": False}
    choices |= {"target_sparsity": None, "max_layer_sparsity": None, "allocation": "global", "normalise": None}
    if not hasattr(args, "NM_N"):
        choices["layer_sparsity"] = {}  # for N:M, rules say what the masks are checked against
    chosen = [f"--{flag}" for flag, none in choices.items() if getattr(args, flag, none) != none]
    if args.masks is not None and chosen:
        raise UsageError(f"--masks says which weights survive: leave {' and '.join(chosen)} out.")
    if args.export_masks is None:
        return
    if getattr(args, "permute", False):
        raise UsageError("--export_masks would write masks of permuted channels, which fit no other network.")
    if len(args.algo) * len(args.seed) > 1:
        raise UsageError("--export_masks is for one run: give one --algo and one --seed.")
    if not args.export_masks.parent.is_dir():
        raise UsageError(f"--export_masks: there is no folder {args.export_masks.parent}.")
    if args.export_masks.suffix != ".safetensors":
        raise UsageError(f"--export_masks writes .safetensors: {args.export_masks} has another ending.")
