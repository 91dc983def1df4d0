"""What a node computes with parameters, whether a module does it or a function: linear maps and BatchNorms.

A network may call `nn.Conv2d`, or `F.conv2d` on a weight of its own; so with `nn.Linear` and `nn.BatchNorm2d`. What is
asked here is the operation, so that both codings are solved alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from snows.network.known import is_fixed_batch_norm, is_plain
from snows.network.trace import fetch

SETTINGS = ("stride", "padding", "dilation", "groups")  # of F.conv2d, after input, weight and bias
# Functions that hide linear maps: torchvision's Swin hands both projections of an attention to one.
HIDING = {"shifted_window_attention"}
NORM_DEFAULTS: tuple[Any, ...] = (None, None, None, None, None, False, 0.1, 1e-5)  # of F.batch_norm


@dataclass(frozen=True)
class LinearMap:
    """x -> weight x + bias of one node.

    weight, bias: full names of the parameters; where there is no bias, a name by which a window can be given one, and
        None where it is computed.
    convolution: a module with its settings (on parameters of no meaning where a function convolves); None for a linear
        map, and where the settings are computed.
    """

    weight: str
    bias: str | None
    convolution: nn.Conv2d | None = None
    shows_inputs: bool = True  # whether its input columns can be had


@dataclass(frozen=True)
class FixedNorm:
    """What F.batch_norm takes, as a BatchNorm module holds it."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def parameter_read(node: Any) -> str | None:
    """The name of the parameter or buffer that a node is, or None."""
    return node.target if isinstance(node, fx.Node) and node.op == "get_attr" else None


def attribute(model: nn.Module, name: str) -> Any:
    """What a model holds by a full name; None where there is nothing."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key, None)


def called(node: Any, model: nn.Module) -> nn.Module | None:
    """The module that a node calls, or None."""
    calls = isinstance(node, fx.Node) and node.op == "call_module"
    return model.get_submodule(node.target) if calls else None


def linear_map(node: Any, model: nn.Module) -> LinearMap | None:
    """A node's convolution or linear map, if it is a plain module or a function on parameters; else None."""
    module = called(node, model)
    if is_plain(module, (nn.Conv2d, nn.Linear)):
        convolution = module if isinstance(module, nn.Conv2d) else None
        return LinearMap(f"{node.target}.weight", f"{node.target}.bias", convolution)
    if not isinstance(node, fx.Node) or node.target not in (F.conv2d, F.linear) or len(node.args) < 2:
        return None
    weight, bias = parameter_read(node.args[1]), node.args[2] if len(node.args) > 2 else None
    if weight is None:
        return None
    name = f"{weight}:bias" if bias is None else parameter_read(bias)
    if node.target is F.linear:
        return LinearMap(weight, name)
    convolution = as_module(node, fetch(model, weight))
    return LinearMap(weight, name, convolution, convolution is not None)


def settings(node: fx.Node) -> dict[str, Any]:
    """What a call of F.conv2d asks for besides its input, weight and bias."""
    return {**dict(zip(SETTINGS, node.args[3:])), **node.kwargs}


def as_module(node: fx.Node, weight: Tensor) -> nn.Conv2d | None:
    """A module with the settings of a call of F.conv2d, without numbers; None where the settings are computed."""
    if not set(node.all_input_nodes) <= set(filter(None, node.args[:3])):
        return None
    (out, inputs, *kernel), asked = weight.shape, settings(node)
    channels = inputs * asked.get("groups", 1)
    return nn.Conv2d(channels, out, tuple(kernel), bias=False, device="meta", **asked)


def is_fixed_norm(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node is a BatchNorm that normalises with running statistics, module or function: an affine map."""
    if node.target is not F.batch_norm:
        return is_fixed_batch_norm(called(node, model))
    tensors, training, eps = norm_arguments(node)
    computed = any(each is not None and parameter_read(each) is None for each in tensors)
    fixed = training is False and None not in tensors[:2] and isinstance(eps, (int, float))
    return fixed and not (computed or node.kwargs)


def norm_of(node: fx.Node, model: nn.Module) -> Any:
    """The BatchNorm that such a node is, with a model's numbers: a module or a `FixedNorm`."""
    if node.op == "call_module":
        return model.get_submodule(node.target)
    tensors, _, eps = norm_arguments(node)
    mean, var, weight, bias = (None if each is None else fetch(model, each.target) for each in tensors)
    return FixedNorm(mean, var, weight, bias, eps)


def norm_arguments(node: fx.Node) -> tuple[list[Any], Any, Any]:
    """What a call of F.batch_norm takes: (mean, variance, weight and bias), training, eps."""
    args: list[Any] = [*node.args, *NORM_DEFAULTS[len(node.args) :]]
    return args[1:5], args[5], args[7]


def norm_bias(node: fx.Node) -> str | None:
    """The name of the bias of a BatchNorm's node, which a module may lack; None where a function is given none."""
    if node.op == "call_module":
        return f"{node.target}.bias"
    return parameter_read(node.args[4]) if len(node.args) > 4 else None
