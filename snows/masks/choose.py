"""The masks that a pattern chooses for a network's layers, or the caller's own, checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from torch import Tensor

from snows.calibration.retry import retry_on_out_of_memory
from snows.calibration.streams import Streams
from snows.errors import UsageError, by_reason, listed
from snows.masks.patterns import NM, Pattern, Unstructured
from snows.masks.rules import names_any
from snows.masks.saliency import SALIENCIES, Saliency, check_inputs, comparing, scores
from snows.masks.selection import Choice, Selection, are_masks
from snows.masks.zeros import kept_zeros, leave_all_zero
from snows.network.layers import Layer, Masks
from snows.network.network import Network
from snows.options import Options

MANY = 0.05  # share of the parameters from which on it is said that they are in no layer

log = logging.getLogger("snows")


def chosen_layers(network: Network, layers: Callable[[str], bool]) -> list[Layer]:
    """The layers whose names are chosen.

    Raises:
        UsageError: there are none.
    """
    if not network.layers:
        raise UsageError("nothing to prune: the model has no Conv2d or Linear layer.")
    chosen = [layer for layer in network.layers if layers(layer.name)]
    if not chosen:
        raise UsageError(f"nothing to prune: no layer was selected of {listed(n.name for n in network.layers)}.")
    return chosen


def select(network: Network, choice: Choice, streams: Streams | None, options: Options) -> Selection:
    """The masks of the chosen layers, chosen by the weights as they stand.

    streams: needed where the saliency takes images; at the start of the network before and after.

    Raises:
        UsageError: there is nothing to prune, the pattern does not fit, or a layer hides what the saliency needs.
    """
    chosen, saliency, pattern = chosen_layers(network, choice.layers), SALIENCIES[choice.mask_alg], choice.pattern
    weights = {layer.name: network.model.get_parameter(layer.parameter) for layer in chosen}
    if isinstance(pattern, dict):
        selection = check_user_masks(pattern, weights)
    else:
        if saliency.score is not None or saliency.choose is not None:
            check_inputs(choice.mask_alg, chosen, network, inverse=saliency.choose is not None)
        if saliency.score is not None and (pattern.compares_layers or saliency.choose is None):
            weights = scores_by_images(chosen, saliency, streams, options)
        zeros, total = kept_zeros(network, chosen, choice), counted_parameters(network, pattern)
        pattern = comparing(without_rules_of(network.refused, pattern, weights), saliency)
        selection = pattern.select(weights, total, by_row=saliency.by_row, zeros=zeros)
        leave_all_zero(selection, zeros)
    if not selection.masks:
        raise UsageError(f"nothing to prune: {by_reason(selection.left_dense)}.")
    selection.left_dense |= {layer.name: "not selected" for layer in network.layers if layer not in chosen}
    selection.choice = choice
    return selection


def check_selection(selection: Selection, network: Network) -> Choice:
    """What chose a selection, once it is known to be of this network.

    Raises:
        UsageError: it was not made by `choose_masks`, or its masks are another network's.
    """
    if selection.choice is None:
        raise UsageError("the selection was not made by snows.choose_masks: pass its masks, a dict.")
    weights = {layer.name: network.model.get_parameter(layer.parameter) for layer in network.layers}
    check_user_masks(selection.masks, weights)
    return selection.choice


def counted_parameters(network: Network, pattern: Pattern) -> int:
    """How many parameters a target sparsity is a share of: those that the forward pass uses.

    Others are named, once; and so are matrices that are no layer's, where they are many.
    """
    sizes = {name: parameter.numel() for name, parameter in network.model.named_parameters()}
    idle, outside = sum(sizes[name] for name in network.idle), network.outside()
    share = sum(sizes[name] for name in outside) / max(1, sum(sizes.values()) - idle)
    if not network.told and idle and isinstance(pattern, Unstructured):
        owners = dict.fromkeys(name.split(".")[0] for name in network.idle)
        log.warning(
            "the forward pass does not use %d of the %d parameters (in %s): the target sparsity is of the others",
            *(idle, sum(sizes.values()), listed(owners)),
        )
    if not network.told and share > MANY:
        log.warning(
            "%.0f %% of the parameters stay dense, for no Conv2d, Linear, F.conv2d or F.linear multiplies by them as "
            "they are: %s", 100 * share, listed(outside),
        )  # fmt: skip
    network.told = True
    return sum(sizes.values()) - idle


def scores_by_images(
    layers: list[Layer], saliency: Saliency, streams: Streams | None, options: Options
) -> dict[str, Tensor]:
    """Layer name -> the scores of its weights, from one pass of the images."""
    if streams is None:
        raise UsageError("calibration images are needed to choose these masks.")
    result: dict[str, Tensor] = {}
    depth = options.k_step if saliency.looks_ahead else 0
    streams.check_fits(layers, options.but(k_step=depth, joint_steps=0))
    streams.fit(max(streams.plan.need([layer], depth) for layer in layers))
    for attempt in retry_on_out_of_memory(streams, "the scores"):
        with attempt:
            result = scores(saliency, layers, streams.sparse, options)
    streams.restart()
    return result


def without(pattern: Pattern | Masks, names: Iterable[str]) -> Pattern | Masks:
    """Masks without those of some layers; a pattern as it is."""
    if isinstance(pattern, dict):
        return {name: mask for name, mask in pattern.items() if name not in names}
    return pattern


def without_rules_of(refused: Collection[str], pattern: Pattern, names: Collection[str]) -> Pattern:
    """A pattern without the rules that name none of the layers, but some that the network refuses, as it has told."""
    rules = pattern.layer_sparsity
    kept = {rule: rules[rule] for rule in rules if names_any(rule, names) or not names_any(rule, refused)}
    return replace(pattern, layer_sparsity=kept)


def mask_rule(layer: Layer, mask: Tensor, pattern: Pattern) -> NM | int | None:
    """What a layer's mask, chosen at its turn, must keep to: its N:M, or as many weights removed as `mask` removes."""
    return pattern.of(layer.name) if isinstance(pattern, NM) else int((~mask).sum())


def check_user_masks(masks: Masks, weights: dict[str, Tensor]) -> Selection:
    """The caller's own masks, checked against the prunable layers' weights.

    Raises:
        UsageError: a name that is no prunable layer, or what is no mask of zeros and ones of its weight's shape.
    """
    unknown = [name for name in masks if name not in weights]
    if unknown:
        raise UsageError(f"masks name {listed(unknown)}, which are not prunable layers; those are {listed(weights)}.")
    other = [name for name, mask in masks.items() if not isinstance(mask, Tensor) or not are_masks([mask])]
    if other:
        raise UsageError(f"masks must be tensors of booleans, or of 0 and 1: {listed(other)}.")
    misfits = [
        f"{name}: {tuple(mask.shape)} for a weight {tuple(weights[name].shape)}"
        for name, mask in masks.items()
        if mask.shape != weights[name].shape
    ]
    if misfits:
        raise UsageError(f"masks of the wrong shape: {listed(misfits)}.")
    left_dense = {name: "no mask was given" for name in weights if name not in masks}
    return Selection({name: mask.to(weights[name].device).bool() for name, mask in masks.items()}, left_dense)
