"""A flag for each field of snows.Options, and back."""

from __future__ import annotations

import argparse
from dataclasses import fields

from snows.options import PRESETS, Options


def boolean(text: str) -> bool:
    """True or False as the command line spells them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text.lower() == "true"


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per option, plus --preset; flags that are not given take the preset's value."""
    group = parser.add_argument_group("objective and solver")
    group.add_argument("--preset", default="best", choices=PRESETS, help="values of the flags below that are not given")
    for f in fields(Options):
        if f.name == "seed":  # belongs to the experiment: the scripts may run several
            continue
        kind = boolean if isinstance(f.default, bool) else type(f.default)
        paper = PRESETS["paper"].get(f.name, f.default)
        values = f"{f.default}" if paper == f.default else f"{f.default}; paper: {paper}"
        group.add_argument(
            f"--{f.name}",
            type=kind,
            default=argparse.SUPPRESS,
            choices=f.metadata["choices"],
            metavar="True|False" if kind is boolean else None,
            help=f"{f.metadata['help']} (default: {values})",
        )


def options_of(args: argparse.Namespace, seed: int) -> Options:
    """The options that parsed flags ask for."""
    given = {f.name: getattr(args, f.name) for f in fields(Options) if f.name != "seed" and hasattr(args, f.name)}
    return Options.preset(args.preset, **given, seed=seed)
