"""The network that is pruned: the private copy of a model, its graph, and the prunable layers among its nodes.

The calibration set on its way through the network is a `Stream` (snows/calibration/stream.py); the part from a layer to
the K-th counted operation after it is a `Window` (snows/network/window.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from snows.errors import SnowsError, first_line
from snows.network.checks import check_device, check_model
from snows.network.concrete import Example, trace_somehow
from snows.network.graph import Graph, owners_of
from snows.network.known import cached_tensors
from snows.network.layers import Layer, candidates, find_layers


class Network(Graph):
    """A traced model and the prunable `layers` among its nodes.

    `original` is the caller's model, which must not change meanwhile, `model` a private copy in evaluation mode, whose
    weights change as layers are solved; `in_place` names its modules that wrote in place. `refused`: each Conv2d or
    Linear whose weight cannot be pruned, and why. `checked`: the windows and images on which the trace has been
    compared (calibration/faithful.py). `told`: whether it has been said which parameters are idle.
    `example`: images, the shape of one, or what gives images, for models that cannot be traced without.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu", example: Example = None):
        check_device(device)
        check_model(model)
        self.original, self.device = model, device
        private = copied(model, device).eval().requires_grad_(False)
        for module in private.modules():
            module._backward_hooks.clear()  # these and the next belong to training
            module._backward_pre_hooks.clear()
            if isinstance(module, nn.DataParallel):
                module.device_ids = []  # it calls the network inside, wherever that is
        self.in_place = [n for n, m in private.named_modules() if getattr(m, "inplace", False) is True]
        super().__init__(private, trace_somehow(private, example))
        self.layers, self.refused = find_layers(self)
        self.checked: Any = None
        self.told = False

    def copy(self) -> Network:
        """Another network of the same trace, whose weights change on their own."""
        twin = copy.copy(self)
        twin.model = copied(self.model)
        twin.owners = owners_of(twin.model)
        twin.affine, twin.pairs, twin.refused = set(self.affine), set(self.pairs), dict(self.refused)
        return twin

    def call_as_it_is(self, nodes: Iterable[fx.Node]) -> None:
        """Take these BatchNorms for no affine maps, nor fold them."""
        self.affine -= set(nodes)
        self.batch_norm_of = self.pair_batch_norms()
        refused = self.refused
        self.layers, self.refused = find_layers(self)
        for name in refused.keys() - self.refused.keys():
            self.refuse(name, refused[name])

    def refuse(self, name: str, reason: str) -> None:
        """Leave a layer dense."""
        self.layers = [layer for layer in self.layers if layer.name != name]
        self.refused[name] = reason

    def masked(self, layer: Layer, mask: Tensor) -> Tensor:
        """A layer's weight where its mask keeps it, else zero, even where it was NaN."""
        return self.model.get_parameter(layer.parameter).where(mask, 0)

    def outside(self) -> list[str]:
        """The weights that the forward pass uses and that are no layer's, nor refused as one: an LSTM's, say."""
        layers = {layer.parameter for layer in self.layers} | candidates(self).keys()
        others = (name for name, each in self.model.named_parameters() if each.ndim > 1 and name not in layers)
        return [name for name in others if name not in self.idle]


def copied(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy of a model, on a device; tied parameters stay tied, which not every device's `to` sees to.

    Raises:
        SnowsError: it cannot be copied.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    memo: dict[int, Any] = {id(cached): cached.detach().clone() for cached in cached_tensors(model)}
    held = (each for module in model.modules() for each in vars(module).values())
    memo |= {id(each): each for each in held if isinstance(each, torch.jit.ScriptFunction)}  # refuses a copy
    try:
        model = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module's tensors raise
        raise SnowsError(
            f"the model cannot be copied: {first_line(error)} torch.nn.utils.prune and weight_norm leave weights that "
            f"cannot be: make them permanent first (prune.remove, remove_weight_norm)."
        ) from error
    model = model if device is None else model.to(device)
    for first, *others in names.values():
        for owner, _, own in (name.rpartition(".") for name in others):
            setattr(model.get_submodule(owner), own, model.get_parameter(first))
    return model
