"""Masks that were made elsewhere, read from a file."""

from __future__ import annotations

from pathlib import Path

from snows.classifier import read_state
from snows.errors import UsageError
from snows.graph import Layer
from snows.layer_rules import listed
from snows.masks import NM, Masks, Pattern


def read_masks(path: Path, layers: list[Layer], pattern: Pattern | None = None) -> Masks:
    """Masks by layer name from a file, checked against a network's layers.

    The file (.safetensors, or what torch.save wrote) holds either masks, 0 or 1 or boolean, True where a weight
    survives, under the names of layers or of their weights; or the checkpoint of a sparse network, whose zeros are the
    mask, and where layers without a zero stay dense.

    pattern: an NM that the masks must keep to.

    Raises:
        UsageError: the file is missing or damaged, or names, shapes or pattern do not fit; the message lists what.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in read_state(path).items()}
    by_name = {name: layer for layer in layers for name in (layer.name, layer.parameter)}
    found = {by_name[name].name: tensor for name, tensor in state.items() if name in by_name}
    if are_masks(state.values()):
        unknown = [name for name in state if name not in by_name]
        if unknown:
            raise UsageError(f"{path} holds masks of {listed(unknown)}, which are no prunable layers.")
        masks = {name: tensor.bool() for name, tensor in found.items()}
    else:
        masks = {name: tensor != 0 for name, tensor in found.items() if (tensor == 0).any()}
    if not masks:
        names = listed(layer.name for layer in layers)
        raise UsageError(f"{path} holds neither masks nor zeros for any of the layers {names}.")
    shapes = {layer.name: layer.shape for layer in layers}
    misfits = [f"{n}: {tuple(m.shape)}, not {tuple(shapes[n])}" for n, m in masks.items() if m.shape != shapes[n]]
    if misfits:
        raise UsageError(f"{path} holds masks of the wrong shape: {listed(misfits)}.")
    if isinstance(pattern, NM):
        broken = [name for name, mask in masks.items() if not pattern.holds(mask)]
        if broken:
            raise UsageError(f"{path} does not keep to {pattern} in {listed(broken)}.")
    return masks


def are_masks(tensors) -> bool:
    """Whether all the tensors hold nothing but zeros and ones."""
    return all(((tensor == 0) | (tensor == 1)).all() for tensor in tensors)
