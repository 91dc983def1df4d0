"""A packed checkpoint: of each tensor a bit for every entry, and the entries whose bit is set; bit-exact, any pattern.

One .safetensors file. A tensor NAME lies in it as NAME.values, in order, and NAME.bitmask, eight entries a byte, the
first in the lowest bit, where that takes fewer bytes than the tensor; its shape, and which layers have a mask, stand in
the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from snows.network.known import weight_name

FORMAT, VERSION = "snows_packed", "1"  # the entry of the metadata that tells such a file
VALUES, BITMASK = ".values", ".bitmask"
FILE = "packed.safetensors"  # in a run folder


def pack(state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None) -> bytes:
    """The content of a packed file.

    masks: by layer name. The bitmask of a layer's weight is its mask, so that a survivor that is zero stays one.
    """
    masks = masks or {}
    mask_of = {weight_name(layer, state): mask for layer, mask in masks.items()}
    tensors, shapes = {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        kept = has_bits(tensor)
        if name in mask_of:
            kept |= mask_of[name].cpu().reshape(-1)
        if name not in mask_of and len(kept) // 8 + int(kept.sum()) * tensor.itemsize >= tensor.nbytes:
            tensors[name] = tensor.clone()  # two names may share one memory
            continue
        shapes[name] = list(tensor.shape)
        tensors[name + VALUES] = entries(tensor)[kept].view(tensor.dtype).reshape(-1)
        tensors[name + BITMASK] = torch.from_numpy(np.packbits(kept.numpy(), bitorder="little"))
    text = {"shapes": shapes, "layers": list(masks)}
    metadata = {FORMAT: VERSION} | {key: json.dumps(value, separators=(",", ":")) for key, value in text.items()}
    return safetensors.torch.save(tensors, metadata)


def entries(tensor: Tensor) -> Tensor:
    """The bytes of each entry (n, bytes) of a contiguous tensor, which every type of numbers has and can be written."""
    return tensor.reshape(-1).view(torch.uint8).reshape(tensor.numel(), tensor.itemsize)


def has_bits(tensor: Tensor) -> Tensor:
    """Which entries of a contiguous tensor (flat) have a bit that is set: all but zero itself, and also minus zero."""
    return entries(tensor).bool().any(1)


def is_packed(path: Path) -> bool:
    """Whether a .safetensors file is packed."""
    with safetensors.safe_open(path, "pt") as file:
        return FORMAT in (file.metadata() or {})


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors by name, masks by layer name) of a packed file.

    Raises:
        ValueError, KeyError, RuntimeError: its parts do not fit one another.
    """
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    if metadata[FORMAT] != VERSION:
        raise ValueError(f"packed as version {metadata[FORMAT]}, of which this version of SNOWS knows nothing")
    shapes, layers = json.loads(metadata["shapes"]), json.loads(metadata["layers"])
    kept = {name: bits(found.pop(name + BITMASK), shape) for name, shape in shapes.items()}
    for name, mask in kept.items():
        values = found.pop(name + VALUES)
        if len(values) != int(mask.sum()):
            raise ValueError(f"{name} has {len(values)} values for {int(mask.sum())} bits")
        found[name] = torch.zeros(mask.shape, dtype=values.dtype)
        entries(found[name])[mask.reshape(-1)] = entries(values)
    return found, {layer: kept[weight_name(layer, found)] for layer in layers}


def bits(packed: Tensor, shape: list[int]) -> Tensor:
    """A boolean tensor of that shape from its bits."""
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little").astype(bool)).reshape(shape)
