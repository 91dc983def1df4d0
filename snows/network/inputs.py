"""What a layer reads: its input columns x, of which masks and preconditioners take the second moment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows.network.layers import Layer
from snows.network.network import Network

MAX_INPUTS = 16384  # columns beyond which A is not formed, and CG runs plain


def shows_inputs(network: Network, layer: Layer) -> bool:
    """Whether a layer's input columns can be had: those of a plain convolution or linear map, module or function."""
    mapped = network.linear_maps.get(layer.node)
    return mapped is not None and mapped.shows_inputs


def can_factor(network: Network, layer: Layer) -> bool:
    """Whether A can be formed: the input columns can be had and are not too many."""
    return shows_inputs(network, layer) and layer.shape[1:].numel() <= MAX_INPUTS


def layer_columns(network: Network, layer: Layer, x: Tensor) -> Tensor:
    """The input columns of a layer that shows them, from what its node reads."""
    return input_columns(network.linear_maps[layer.node].convolution, x)


def input_columns(module: nn.Module | None, x: Tensor) -> Tensor:
    """The input columns that a layer's weight multiplies: (groups, in, positions), `in` as in weight.flatten(1).

    module: a convolution, else the layer is a linear map.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    padding = module.padding
    if module.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (n, C kh kw, positions)
    n, _, positions = patches.shape
    return patches.view(n, module.groups, -1, positions).permute(1, 2, 0, 3).flatten(2)


def moment_size(layer: Layer, ones: bool = False) -> int:
    """How many numbers the second moment of a layer's input columns has."""
    return layer.groups * (layer.shape[1:].numel() + ones) ** 2


def no_moment(layer: Layer, like: Tensor, ones: bool = False) -> Tensor:
    """The second moment of no input columns of a layer, of a tensor's type and where it is."""
    columns = layer.shape[1:].numel() + ones
    return like.new_zeros(layer.groups, columns, columns)


def second_moment(columns: Tensor, ones: bool = False) -> Tensor:
    """The sum of x x^T over input columns x (groups, in, positions): (groups, in, in).

    ones: every x ends in 1 besides, which a bias update multiplies: (groups, in + 1, in + 1).
    """
    if ones:
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
    return columns @ columns.transpose(1, 2)
