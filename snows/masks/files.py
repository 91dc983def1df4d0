"""Masks that were made elsewhere, read from a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import Tensor

from snows.errors import UsageError, listed
from snows.masks.patterns import NM
from snows.masks.selection import are_masks
from snows.network.layers import Masks
from snows.network.network import Network
from snows.zoo.checkpoints import ASP_MASK, ASP_REST, DENSE_OF, MASK_OF, State, common_prefix, read_state


def read_masks(path: Path, network: Network) -> Masks:
    """Masks by layer name from a file, checked against a network.

    The file (.safetensors, or what torch.save wrote) holds masks, 0 or 1 or boolean, True where a weight survives,
    under the names of layers or of their weights; or the checkpoint of a sparse network, whose zeros are the mask, and
    where layers without a zero stay dense; or one that torch.nn.utils.prune or NVIDIA's ASP left, with masks next to
    the weights; or nni's dict of dicts. A mask of ones removes nothing, but its layer's weights are solved with the
    others'.

    Raises:
        UsageError: the file is missing or damaged, or names, shapes or values do not fit; the message lists what.
    """
    prunable = {layer.parameter: layer.name for layer in network.layers}
    state = named_as_by_torch(without_prefix(read_state(path), network))
    layer_of = {name: prunable.get(name.removesuffix(MASK_OF), name) for name in state}
    masks = {
        name: tensor for name, tensor in state.items() if name in prunable.values() or is_mask_of_weight(name, state)
    }
    weights = {name: tensor for name, tensor in state.items() if name not in masks and not name.endswith(DENSE_OF)}
    if are_masks(state.values()):
        masks, weights = state, {}
    check_values(path, masks, weights)
    check_fit(path, {layer_of[name]: mask for name, mask in masks.items()}, weights, network)
    zeros = {name: tensor != 0 for name, tensor in weights.items() if name in prunable and (tensor == 0).any()}
    named = [(layer_of[name], mask.bool()) for name, mask in [*zeros.items(), *masks.items()]]
    twice = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if twice:
        raise UsageError(f"{path} holds two masks of {listed(twice)}.")
    if not named:
        names = listed(layer.name for layer in network.layers)
        raise UsageError(f"{path} holds neither masks nor zeros for any of the layers {names}.")
    return dict(named)


def without_prefix(state: State, network: Network) -> State:
    """A file's tensors without what stands before all of the network's names there, as "model."; mostly nothing."""
    own = dict(network.model.state_dict())
    for layer in network.layers:
        own |= dict.fromkeys((layer.name, layer.parameter + MASK_OF, layer.parameter + DENSE_OF), own[layer.parameter])
    prefix = common_prefix(state, own)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def named_as_by_torch(state: State) -> State:
    """ASP's masks, and the weights beside them, by torch.nn.utils.prune's names; without nni's idle masks of biases."""
    if are_masks(state.values()):
        state = {name: mask for name, mask in state.items() if not (name.endswith(".bias") and mask.all())}
    renamed = {}
    for name, tensor in state.items():
        path, _, parameter = name.rpartition(".")
        if f"{path}.__{parameter}_mma_mask".lstrip(".") in state:
            name += DENSE_OF
        if not ASP_REST.search(name):
            renamed[ASP_MASK.sub(rf"\1\2{MASK_OF}", name)] = tensor
    return renamed


def is_mask_of_weight(name: str, state: dict[str, Tensor]) -> bool:
    """Whether torch.nn.utils.prune left this tensor, next to the parameter as it was, or someone without that."""
    parameter = name.removesuffix(MASK_OF)
    return name.endswith(MASK_OF) and (parameter + DENSE_OF in state or parameter.endswith("weight"))


def check_values(path: Path, masks: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Refuse masks that are neither 0 nor 1, and NaN in weights.

    Raises:
        UsageError: it lists them.
    """
    other = [name for name, tensor in masks.items() if not are_masks([tensor])]
    if other:
        raise UsageError(f"{path} holds masks with values other than 0 and 1: {listed(other)}.")
    broken = [name for name, tensor in weights.items() if tensor.isnan().any()]
    if broken:
        raise UsageError(f"{path} holds NaN in {listed(broken)}.")


def check_fit(path: Path, masks: Masks, weights: dict[str, Tensor], network: Network) -> None:
    """Refuse masks and weights that are not of this network.

    Raises:
        UsageError: it lists names that the network does not have, or shapes that are others.
    """
    layers = {layer.name: layer.shape for layer in network.layers}
    tensors = {name: tensor.shape for name, tensor in network.model.state_dict().items()}
    for kind, found, shapes in (("masks", masks, layers), ("weights", weights, tensors)):
        unknown = [name for name in found if name not in shapes]
        if unknown:
            none_of = "are no prunable layers" if kind == "masks" else "this network does not have"
            raise UsageError(f"{path} holds {kind} of {listed(unknown)}, which {none_of}.")
        misfits = [f"{n}: {tuple(t.shape)}, not {tuple(shapes[n])}" for n, t in found.items() if t.shape != shapes[n]]
        if misfits:
            raise UsageError(f"{path} holds {kind} of the wrong shape: {listed(misfits)}.")


def check_pattern(path: Path, masks: Masks, pattern: NM) -> None:
    """Refuse masks that remove something and do not keep to an N:M pattern.

    Raises:
        UsageError: it lists them.
    """
    rules = {name: pattern.of(name) for name, mask in masks.items() if not mask.all()}
    broken = [name for name, rule in rules.items() if rule is None or not rule.holds(masks[name])]
    if broken:
        raise UsageError(f"{path} does not keep to {pattern} in {listed(broken)}.")
