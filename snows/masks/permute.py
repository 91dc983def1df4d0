"""Input channels in another order, so that N:M groups keep more magnitude; the network computes the same function.

Which N of M consecutive channels survive depends on which channels stand together (Pool and Yu 2021). A layer's input
channels may be put in any order if the layer that produces them writes them in that order: its output rows are
permuted, and with them the parameters of the norms in between. That needs a producer whose output goes nowhere else,
through operations that treat every channel alike, and parameters that nothing else reads; other layers are left as
they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from snows.masks.patterns import NM
from snows.modes import own_modes
from snows.network.known import is_watched
from snows.network.layers import Layer, Network

ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Dropout, nn.Identity)
ELEMENTWISE_FUNCTIONS = {"relu", "relu6", "gelu", "silu", "hardswish", "dropout"}
# Per kind of producer: what may lie between it and the layer, channel by channel. A Linear's channels come last.
BETWEEN = {nn.Conv2d: (nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d), nn.Linear: (nn.LayerNorm,)}
ROUNDS = 300  # of trial swaps


@dataclass
class Permuted:
    """A network that computes the same function, and the share of the magnitude that N:M keeps in each layer."""

    model: nn.Module
    kept: dict[str, tuple[float, float]]  # layer name -> (before, after)


@own_modes()
def permute(
    model: nn.Module, pattern: NM, layers: Callable[[str], bool] = lambda name: True, seed: int = 0
) -> Permuted:
    """A copy of `model` whose layers' input channels are in an order that keeps more magnitude, where they may be.

    layers: which layers are to be pruned, by name.
    """
    network, result = Network(model), Permuted(copy.deepcopy(model), {})
    weights = {
        layer.name: network.model.get_parameter(layer.parameter) for layer in network.layers if layers(layer.name)
    }
    for name in pattern.select(weights, 0).masks:
        layer = next(each for each in network.layers if each.name == name)
        owners = producers(network, layer)
        if owners:
            weight = result.model.get_parameter(layer.parameter)
            rule = pattern.of(name) or pattern
            order, before, after = best_order(weight, rule, seed)
            if after > before:
                reorder(result.model, layer, owners, order)
            result.kept[name] = (before, max(before, after))
    return result


def producers(network: Network, layer: Layer) -> list[str]:
    """The modules that own a parameter for each input channel of a layer, up to the one that produces them.

    Empty where the channels cannot be put in another order.
    """
    kind = type(network.module(layer.node))
    if kind not in BETWEEN or layer.groups != 1 or not is_private(network, layer.node.target):
        return []
    owners: list[str] = []
    node = layer.node.all_input_nodes[0]
    while len(node.users) == 1:
        module = network.module(node)
        if type(module) is kind:
            private = is_private(network, node.target) and getattr(module, "groups", 1) == 1
            return [*owners, node.target] if private else []
        if type(module) in BETWEEN[kind] and len(getattr(module, "normalized_shape", "1")) == 1:
            if not is_private(network, node.target):
                return []
            owners.append(node.target)
        elif not is_elementwise(node, module):
            return []
        node = node.all_input_nodes[0]
    return []


def is_private(network: Network, name: str) -> bool:
    """Whether a module's parameters, if it has any, serve one call of it and nothing else, and no hook looks on."""
    module = network.model.get_submodule(name)
    if not module.state_dict():
        return not is_watched(module)
    read = any(node.op == "get_attr" and node.target.startswith(f"{name}.") for node in network.nodes)
    shared = any(network.is_shared(f"{name}.{parameter}") for parameter, _ in module.named_parameters())
    return network.calls[name] == 1 and not (read or shared or is_watched(module))


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node does the same to every number of its only input."""
    if module is not None:
        return type(module) in ELEMENTWISE and not is_watched(module)
    return node.op != "get_attr" and getattr(node.target, "__name__", node.target) in ELEMENTWISE_FUNCTIONS


@torch.no_grad()
def reorder(model: nn.Module, layer: Layer, owners: list[str], order: Tensor) -> None:
    """Put the input channels of a layer in another order, and whatever its producers hold for each of them."""
    weight = model.get_parameter(layer.parameter)
    weight.copy_(weight[:, order])
    for owner in owners:
        for tensor in model.get_submodule(owner).state_dict().values():
            if tensor.ndim:  # not a counter of batches
                tensor.copy_(tensor[order])


def best_order(weight: Tensor, pattern: NM, seed: int) -> tuple[Tensor, float, float]:
    """(order of the input channels, share of the magnitude kept without it, and with it) for a weight (out, in, ...).

    Channels are swapped between random pairs of groups, all pairs at once, and each swap that keeps more is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = weight.detach().abs().movedim(1, 0).flatten(1)  # (in, out x positions)
    order = torch.arange(len(columns), device=weight.device).view(-1, pattern.m)  # a row is a group

    def kept(order: Tensor) -> Tensor:
        """(groups,): the magnitude that each group keeps."""
        return columns[order].topk(pattern.n, dim=1).values.sum((1, 2), dtype=torch.float64)

    score = kept(order)
    first = score.sum()
    pairs = len(order) // 2
    for _ in range(ROUNDS if pairs else 0):
        one, other = (
            torch.randperm(len(order), generator=generator, device="cpu")[: 2 * pairs].view(2, pairs).to(weight.device)
        )
        i, j = torch.randint(pattern.m, (2, pairs), generator=generator, device="cpu").to(weight.device)
        trial = order.clone()
        trial[one, i], trial[other, j] = order[other, j], order[one, i]
        after = kept(trial)
        better = after[one] + after[other] > score[one] + score[other]
        for group in (one[better], other[better]):
            order[group], score[group] = trial[group], after[group]
    total = columns.sum(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    return order.flatten(), (first / total).item(), (score.sum() / total).item()
