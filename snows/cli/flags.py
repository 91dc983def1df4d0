"""The scripts' command lines: the flags that all share, and those of each kind of pattern; messages that name them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch

from snows.cli.option_flags import add_option_flags, boolean
from snows.cli.resume import resumed
from snows.cli.settings import PatternOf, RunSettings, check_flags, from_flags
from snows.deploy.deployable import ExportOptions
from snows.deploy.exports import EXPORTS
from snows.errors import UsageError
from snows.masks.allocation import ALLOCATIONS
from snows.masks.patterns import NM, Unstructured
from snows.masks.rules import read_rules
from snows.masks.saliency import SALIENCIES, comparing
from snows.methods import METHODS
from snows.zoo.images import DATASETS

LAYER_WISE = ", ".join(name for name, saliency in SALIENCIES.items() if saliency.layer_wise)
ALGO_HELP = "how the survivors are set: SNOWS; MP, as they were; MP+, by layer-wise least squares; SparseGPT's own way"


def whole(least: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number, `least` or more and small enough for torch."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and 2^63")
        return value

    return number


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes end in one line, as all that goes wrong does."""

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"unrecognized arguments: (--\w+)", message)
        near = get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        raise UsageError(f"{message}{f' (did you mean {near[0]}?)' if near else ''}; --help lists the flags.")


def parser(description: str, arch: str) -> argparse.ArgumentParser:
    """The flags that every script shares; `arch` is the network that ships with the repository."""
    flags = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_flags(flags, arch)
    add_mask_flags(flags)
    add_run_flags(flags)
    add_export_flags(flags)
    add_option_flags(flags)
    return flags


def add_network_flags(flags: argparse.ArgumentParser, arch: str) -> None:
    group = flags.add_argument_group("network and images")
    group.add_argument(
        "--arch",
        default=arch,
        help="the network; also hf-hub:OWNER/NAME, local-dir:FOLDER, transformers:OWNER/NAME, transformers:FOLDER "
        f"(default: {arch}, which ships with SNOWS)",
    )
    group.add_argument("--checkpoint", type=Path, help="local weights for --arch (.safetensors, .pt, .pth, .bin)")
    group.add_argument(
        "--checkpoint_key",
        metavar="KEY",
        help="the entry of --checkpoint to take, where it has several",
    )
    group.add_argument("--random_weights", action="store_true", help="no trained weights: to try speed and memory")
    group.add_argument("--num_classes", type=whole(1), help="classes of a library's network, if not its usual")
    group.add_argument("--mean", type=float, nargs="+", help="normalisation the network was trained with, per channel")
    group.add_argument("--std", type=float, nargs="+", help="normalisation the network was trained with, per channel")
    names = ", ".join(DATASETS)
    group.add_argument("--dset", help=f"{names}, a folder of images or an .npz (default: what fits --arch)")
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="a folder of --dset per line, in the order of the network's outputs (default: by name; those of ImageNet "
        "are known to a network of 1000 outputs)",
    )
    group.add_argument(
        "--resize", type=whole(1), metavar="N", help="first scale the shorter side to N pixels and cut the middle out"
    )
    group.add_argument("--skip_broken", action="store_true", help="leave images out that cannot be read")
    group.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    group.add_argument("--ngrads", type=whole(1), default=1000, help="number of calibration images (default: 1000)")
    group.add_argument("--mirror", action="store_true", help="flip half of the calibration images left to right")
    group.add_argument("--test_batch_size", type=whole(1), default=256, help="test images per batch (default: 256)")
    group.add_argument("--num_workers", type=whole(0), default=0, help="processes that load images (default: 0)")


def add_mask_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("masks")
    group.add_argument(
        "--mask_alg",
        default="MP",
        choices=SALIENCIES,
        help="which weights survive: the largest (MP), those that Wanda, SparseGPT or ALPS choose, or those without "
        "which the K-step loss would rise most (OBS) (default: MP)",
    )
    group.add_argument(
        "--masks",
        type=Path,
        metavar="FILE",
        help=".safetensors, .pt or .pth: masks of your own (booleans, or 0 and 1, 1: survives; by layer or weight "
        "name), or a sparse checkpoint, whose zeros are the mask. They alone say how much is pruned; N:M is checked",
    )
    group.add_argument(
        "--keep_zeros",
        type=boolean,
        default=True,
        metavar="True|False",
        help="weights that are zero already, in layers of a sparse network, stay zero (default: True)",
    )
    group.add_argument("--export_masks", type=Path, metavar="FILE", help="write the masks here, for --masks to read")
    group.add_argument("--skip", nargs="+", default=[], metavar="PATTERN", help="layers left dense, as 'layer1.*' 'fc'")
    group.add_argument(
        "--layer_sparsity",
        type=read_rules,
        default={},
        metavar="FILE",
        help='json, layer name or pattern to sparsity (N:M: to a pattern): {"layer3.*": 0.9, "fc": "dense"}',
    )


def add_run_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("run")
    group.add_argument("--algo", nargs="+", default=["SNOWS"], choices=METHODS, help=ALGO_HELP)
    group.add_argument("--seed", type=whole(0), nargs="+", default=[0], help="one run for each (default: 0)")
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    group.add_argument("--deterministic", action="store_true", help="the same bits every time on a GPU too; slower")
    group.add_argument("--skip_evaluation", action="store_true", help="measure no accuracies (random weights)")
    group.add_argument("--evaluate_layers", action="store_true", help="measure the accuracy after each layer")
    group.add_argument("--out_dir", type=Path, help="folder of the run (default: a new one under runs/)")
    group.add_argument(
        "--resume", type=Path, metavar="RUN_DIR", help="go on with the run of this folder, all its flags"
    )
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="a line per layer on a terminal too; full tracebacks")
    loudness.add_argument("--quiet", action="store_true", help="nothing per layer, only what the run ends with")


def add_export_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("export")
    group.add_argument(
        "--export",
        nargs="+",
        default=[],
        choices=EXPORTS,
        help="files of the pruned network for runtimes; with --resume RUN_DIR of a finished run",
    )
    add_how_flags(group)


def add_how_flags(group: argparse._ActionsContainer) -> None:
    """The flags of all exports, which `python -m snows.export` has too."""
    group.add_argument("--half", action="store_true", help="fp16 inside; images and logits stay float32 (not int8)")
    group.add_argument(
        "--int8_tolerance",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="percent points of accuracy that int8 may lose (default: 1.0)",
    )
    group.add_argument(
        "--int8_float",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that int8 leaves in float, as 'patch_embed.*' 'fc'; none: NNCF's own defaults (default: the first "
        "convolutions)",
    )


def how(args: argparse.Namespace) -> ExportOptions:
    """The choices that those flags make."""
    return ExportOptions(args.half, args.int8_tolerance, tuple(args.int8_float))


def parse(flags: argparse.ArgumentParser, pattern_of: PatternOf) -> RunSettings:
    """The settings of the command; with --resume, those that the run began with and what has changed since.

    pattern_of: `unstructured` or `nm`, which make the pattern of its flags.

    Raises:
        UsageError: flags contradict each other; --resume names no run of this script, or other flags contradict it.
    """
    args = flags.parse_args()
    if args.resume is not None:
        return resumed(flags, args.resume, pattern_of)
    check_flags(args)
    return from_flags(args, pattern_of, sys.argv[1:])


@cache
def names() -> set[str]:
    """The names of the flags of all scripts, without the dashes."""
    flags = parser("", "")
    add_unstructured_flags(flags, default=0.0)
    add_nm_flags(flags)
    return set(re.findall(r"--(\w+)", flags.format_usage()))


def as_flags(message: str) -> str:
    """A message of the library, which names options as `batch_size`, as a shell's user knows them: --batch_size.

    What the library leaves out by `layers`, a function, the shell leaves out by --skip.
    """
    known = {name: f"--{name}" for name in names()} | {"layers": "--skip"}
    return re.sub(r"`(\w+)`", lambda found: known.get(found[1], found[0]), message)


def add_unstructured_flags(flags: argparse.ArgumentParser, default: float) -> None:
    group = flags.add_argument_group("pattern")
    group.add_argument(
        "--target_sparsity",
        type=float,
        help=f"share of all parameters to set to zero (default: {default})",
    )
    flags.set_defaults(default_sparsity=default)
    group.add_argument("--max_layer_sparsity", type=float, help="cap per layer (default: halfway from the target to 1)")
    group.add_argument(
        "--allocation",
        default="global",
        choices=ALLOCATIONS,
        help="sparsity of the layers: by comparing scores across them, equal, or Erdos-Renyi kernel (default: global)",
    )
    group.add_argument(
        "--normalise",
        type=boolean,
        metavar="True|False",
        help=f"global: compare scores as shares of their layer's sum (default: True for {LAYER_WISE})",
    )


def unstructured(args: argparse.Namespace) -> Unstructured:
    target = args.default_sparsity if args.target_sparsity is None else args.target_sparsity
    given = Unstructured(target, args.max_layer_sparsity, args.allocation, args.normalise, args.layer_sparsity)
    return comparing(given, SALIENCIES[args.mask_alg])


def add_nm_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("pattern")
    group.add_argument("--NM_N", type=int, default=2, help="weights kept of every M (default: 2)")
    group.add_argument("--NM_M", type=int, default=4, help="consecutive inputs in a group (default: 4)")
    group.add_argument(
        "--permute", action="store_true", help="first put input channels in an order that keeps more, where it can be"
    )


def nm(args: argparse.Namespace) -> NM:
    return NM(args.NM_N, args.NM_M, args.layer_sparsity)
