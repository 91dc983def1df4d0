"""Weights that are zero before anything is pruned: those of a network that is sparse already stay zero."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from snows.masks.selection import Choice, Selection
from snows.network.layers import Layer, Masks
from snows.network.network import Network

log = logging.getLogger("snows")

NOTICEABLE = (
    0.01  # the share of exact zeros from which on a layer is taken to be pruned: trained ones have next to none
)
ALL_ZERO = "all its weights are zero"


def zeros_of(network: Network, layers: Iterable[Layer]) -> Masks:
    """Layer name -> where its weight is zero, of the layers that are sparse already.

    In the caller's model: what solving the layers makes zero on the way to the target is for the masks to say.
    """
    found = {}
    for layer in layers:
        zero = network.original.get_parameter(layer.parameter).detach() == 0
        if zero.sum() >= NOTICEABLE * zero.numel():
            found[layer.name] = zero.to(network.device)
    return found


def kept_zeros(network: Network, layers: Iterable[Layer], choice: Choice) -> Masks:
    """The zeros of these layers' weights, if they are to stay."""
    return zeros_of(network, layers) if choice.keep_zeros else {}


def leave_all_zero(selection: Selection, zeros: Masks) -> None:
    """Take layers out of a selection that have nothing but zeros, an initial head's, say: there is nothing to solve."""
    for name, zero in zeros.items():
        if name in selection.masks and zero.all():
            del selection.masks[name]
            selection.left_dense[name] = ALL_ZERO


def tell_of_zeros(network: Network, selection: Selection, choice: Choice) -> None:
    """Say in a line what becomes of the weights that are zero already, if there are any."""
    zeros = zeros_of(network, [layer for layer in network.layers if layer.name in selection.masks])
    given = isinstance(choice.pattern, dict)  # the caller's own masks, which stay as they are
    if given:
        zeros = {name: zero & selection.masks[name].to(zero.device) for name, zero in zeros.items()}
    counts = [count for zero in zeros.values() if (count := int(zero.sum()))]
    if not counts:
        return
    found = f"{sum(counts)} weights are zero already, in {len(counts)} of {len(selection.masks)} layers"
    if given:
        log.warning("%s, and the masks keep them: they may come back", found)
    elif choice.keep_zeros:
        log.info("%s, and stay zero (`keep_zeros`)", found)
    else:
        log.warning("%s, and may come back (`keep_zeros`)", found)
