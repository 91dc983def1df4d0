"""Channels in another order, so that N:M groups keep more of a score; the network computes the same function.

Which N of M consecutive channels survive depends on which channels stand together (Pool and Yu 2021). The channels of a
set (snows/masks/coupling.py) are put in one order in all that hold them: the rows of the layers that write them, norms,
depthwise filters, and the columns of all the layers that read them, which share the gain (snows/masks/order.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snows.errors import SnowsError, UsageError
from snows.masks.coupling import Coupling
from snows.masks.order import Reading, best_order
from snows.masks.patterns import NM
from snows.masks.slots import Slot
from snows.modes import own_modes
from snows.network.concrete import Example
from snows.network.logits import logits_of
from snows.network.network import Network, copied
from snows.network.operations import attribute

Scores = Mapping[str, Tensor]  # layer name -> what each weight is worth, of the weight's shape


@dataclass
class Permuted:
    """A network that computes the same function, and the share of the score that N:M keeps in each permuted layer."""

    model: nn.Module
    kept: dict[str, tuple[float, float]]  # layer name -> (before, after)


@own_modes()
def permute(
    model: nn.Module,
    pattern: NM,
    layers: Callable[[str], bool] = lambda name: True,
    example: Example = None,
) -> Permuted:
    """A copy of `model` whose channels are in an order in which N:M keeps more, where they may be.

    A set's layers count alike, each by the share of its magnitude that it keeps; a set whose layers gain nothing on
    average stays.

    layers: which layers are to be pruned, by name.
    example: as of `Network`; given, both networks must compute the same of it.

    Raises:
        UsageError: the pattern is no N:M.
        SnowsError: they do not: an operation was followed that treats channels by their place.
    """
    if not isinstance(pattern, NM):
        raise UsageError(f"channels are put in order for an N:M pattern, not for {pattern!r}.")
    network, result = Network(model, example=example), Permuted(copy.deepcopy(model), {})
    coupling = Coupling(network)
    worth = {
        layer.name: network.model.get_parameter(layer.parameter).detach().abs().cpu()
        for layer in network.layers
        if layers(layer.name)
    }
    chosen = pattern.select(worth, 0).masks
    columns = {coupling.slot(each.parameter, 1): each.name for each in network.layers if each.name in chosen}
    for slots in coupling.slots.free():
        readers = {columns[slot]: worth[columns[slot]] for slot in slots if slot in columns}
        readers = {name: score for name, score in readers.items() if score.any()}
        if not readers:
            continue
        order, before, after = best_order(readings(readers, pattern))
        if after > before:
            reorder(result.model, slots, order)
            rules = {name: pattern.of(name) or pattern for name in readers}
            result.kept |= {
                name: (kept_share(score, rules[name]), kept_share(score[:, order], rules[name]))
                for name, score in readers.items()
            }
    if result.kept and example is not None:
        check_function(network.model, copied(result.model, "cpu").eval(), example)
    result.kept = {layer.name: result.kept[layer.name] for layer in network.layers if layer.name in result.kept}
    return result


@torch.no_grad()
def check_function(model: nn.Module, permuted: nn.Module, example: Example) -> None:
    """Refuse a network that computes something else.

    Raises:
        SnowsError: it does.
    """
    example = example() if callable(example) else example
    images = example[:2] if isinstance(example, Tensor) else torch.rand(2, *(example or ()), device="cpu")
    images = images.to("cpu", next(model.parameters()).dtype)
    before, after = (logits_of(each(images)) for each in (model, permuted))
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item(), equal_nan=True):
        raise SnowsError(
            "with its channels in another order the network computes something else: it treats some of them by their "
            "place in a way that is not recognised. Leave the order of its channels as it is."
        )


def readings(readers: Scores, pattern: NM) -> list[Reading]:
    """The scores of layers that read the same channels, each as a share of its own; those of one N:M together."""
    together: dict[tuple[int, int], list[Tensor]] = {}
    for name, score in readers.items():
        rule = pattern.of(name) or pattern
        columns = score.movedim(1, 0).flatten(1).double()  # (in, out x positions)
        together.setdefault((rule.n, rule.m), []).append((columns / columns.sum()).float())
    return [Reading(torch.cat(columns, 1), n, m) for (n, m), columns in together.items()]


def kept_share(score: Tensor, rule: NM) -> float:
    """The share of a layer's score that N:M keeps."""
    return (score[rule.mask(score)].sum(dtype=torch.float64) / score.sum(dtype=torch.float64)).item()


@torch.no_grad()
def reorder(model: nn.Module, slots: list[Slot], order: Tensor) -> None:
    """Put the channels of a set in another order, in all the parameters and buffers that hold them."""
    for name, dim in slots:
        tensor = attribute(model, name)
        tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))
