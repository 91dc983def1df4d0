"""Which weights of a network are prunable layers, and why the others are not.

A `Layer` is a prunable weight and the node that uses it: a weight that the trace shows to be multiplied by as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snows.network.graph import Graph
from snows.network.known import layer_name, multiplies_by_weight, prunable_parameters
from snows.network.operations import HIDING, attribute, norm_bias

Masks = dict[str, Tensor]  # layer name -> boolean mask of the weight's shape, True where the weight survives


@dataclass(frozen=True)
class Layer:
    """A prunable weight: the parameter `name` + ".weight", first used by `node`.

    shape is (out, in) for a linear map and (out, in / groups, kh, kw) for a convolution. `bias` is the parameter that
    can take up a change of the output: the layer's own bias, or that of the BatchNorm after it.
    """

    name: str
    parameter: str
    node: fx.Node
    shape: torch.Size
    groups: int = 1
    bias: str | None = None


def find_layers(graph: Graph) -> tuple[list[Layer], dict[str, str]]:
    """The prunable weights in execution order, and the reason for each Conv2d or Linear that is not among them."""
    layers, refused = {}, {}
    for parameter, module in candidates(graph).items():
        name = layer_name(parameter)
        reason = refusal(graph, parameter, module)
        if reason is not None:
            refused[name] = reason
            continue
        node = graph.users(parameter)[0]
        mapped, shape = graph.linear_maps.get(node), graph.model.get_parameter(parameter).shape
        groups = getattr((mapped and mapped.convolution) or module, "groups", 1)
        layers[name] = Layer(name, parameter, node, shape, groups, bias_of(graph, node, parameter))
    return sorted(layers.values(), key=lambda layer: graph.position[layer.node]), refused


def candidates(graph: Graph) -> dict[str, nn.Module]:
    """What may be a layer's weight, and the module that owns it: by the module's kind, or as a function uses it."""
    weights = {
        f"{path}.{key}".lstrip("."): module
        for path, module in graph.model.named_modules()
        for key in prunable_parameters(module)
    }
    for node in graph.nodes:
        mapped = graph.linear_maps.get(node)
        if mapped is not None and isinstance(attribute(graph.model, mapped.weight), nn.Parameter):
            weights.setdefault(mapped.weight, graph.model.get_submodule(mapped.weight.rpartition(".")[0]))
    return weights


def refusal(graph: Graph, parameter: str, module: nn.Module) -> str | None:
    """Why a weight cannot be pruned, or None."""
    if parameter.rpartition(".")[2] not in module._parameters:
        return "its weight is computed from other parameters"
    if graph.is_shared(parameter):
        return "its weight is that of another layer too"
    if isinstance(module, (nn.Conv2d, nn.Linear)) and not multiplies_by_weight(module):
        return "it does not multiply by its weight as it is (standardised, say)"
    node = next(iter(graph.users(parameter)), None)
    if node is None:
        return "the traced forward pass does not use it"
    if not multiplies(graph, node, parameter):
        user = getattr(node.target, "__name__", node.target)
        return f"its weight goes into {user}, not straight into a linear map or convolution"
    if isinstance(graph.module(node), nn.MultiheadAttention):
        return "its attention takes masks or several inputs, or returns its weights"
    return None


def bias_of(graph: Graph, node: fx.Node, weight: str) -> str | None:
    """The name of the bias that the output of a convolution or linear map alone is added to, or None.

    It is a parameter that nothing reads but what reads the weight, or but the BatchNorm that it belongs to.
    """
    mapped, batch_norm = graph.linear_maps.get(node), graph.batch_norm_of.get(node)
    if mapped is None:
        return None
    name = mapped.bias if batch_norm is None else norm_bias(batch_norm)
    if name is None or not isinstance(attribute(graph.model, name), nn.Parameter) or graph.is_shared(name):
        return None
    readers = graph.users(weight) if batch_norm is None else [batch_norm]
    return name if set(graph.users(name)) <= set(readers) else None


def multiplies(graph: Graph, node: fx.Node, weight: str) -> bool:
    """Whether a node that uses a weight is a module that owns it, or a function that multiplies by it as it is."""
    if graph.reads(node, weight) or getattr(node.target, "__name__", "") in HIDING:
        return True
    return node.target in (F.conv2d, F.linear) and len(node.args) > 1 and graph.reads(node.args[1], weight)
