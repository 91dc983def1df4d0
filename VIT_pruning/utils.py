"""Which vision transformers the scripts know by name, and what --layers_to_prune means.

A line of KNOWN per network; --arch takes any name of torchvision's, timm's or transformers' besides.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
runpy.run_path(str(ROOT / "snows" / "cli" / "loading.py"))  # what follows takes seconds
sys.path.insert(0, str(ROOT))  # a plain checkout works without installation

from vit_small import vit_cifar10, vit_digits

from snows.zoo.images import normalised
from snows.zoo.registry import shipped

KNOWN = {
    "vit_digits": shipped(vit_digits, normalised((0.5,), (0.5,)), "vit_digits.safetensors", accuracy=94.97),
    "vit_cifar10": shipped(vit_cifar10, normalised((0.5,) * 3, (0.5,) * 3), "vit_cifar10.safetensors", accuracy=83.42),
}

# What torchvision, timm and transformers call the parts of a block: the last named component of a layer's dotted path.
IN_PROJ = {"in_proj", "qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj"}
OUT_PROJ = {"out_proj", "attn_out_proj", "proj", "o_proj"}
MLP = {"mlp", "mlp_out_proj"}


def in_proj(name: str) -> bool:
    """The projections to queries, keys and values."""
    return not IN_PROJ.isdisjoint(name.split("."))


def out_proj(name: str) -> bool:
    """The projection after the attention (and not the one of the patches)."""
    return "att" in name and not OUT_PROJ.isdisjoint(name.split("."))


def mlp(name: str) -> bool:
    """The linear maps of the MLPs (and not those of relative positions)."""
    return not MLP.isdisjoint(name.split(".")) and not any(word in name for word in (".attn.", "rel_pos"))


PARTS = {"in_proj": in_proj, "out_proj": out_proj, "mlp": mlp}


def add_layer_flag(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--layers_to_prune",
        nargs="+",
        default=list(PARTS),
        metavar="PART",
        help="in_proj, out_proj, mlp, or patterns of layer names, as 'blocks.3.*' (default: in_proj out_proj mlp)",
    )


def patterns(parts: list[str]) -> list[str]:
    """Those of --layers_to_prune that are names, or patterns of names."""
    return [part for part in parts if part not in PARTS]


def chosen(parts: list[str]) -> Callable[[str], bool]:
    """Whether a layer's name is among --layers_to_prune."""

    def choose(name: str) -> bool:
        return any(PARTS[part](name) if part in PARTS else fnmatchcase(name, part) for part in parts)

    return choose
