"""Windows: the sub-graph from a layer to the K-th counted operation after it, as a function of the layer's weight."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from snows.network.attention import attention_by_parts
from snows.network.known import has_activation
from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.operations import FixedNorm, attribute, norm_of, settings
from snows.network.trace import Values, run_node, value_of

Weights = Sequence[Tensor]  # of the layers, in order
BiasUpdates = Sequence[Tensor | None] | None  # (out,) of each layer; None: it has none; None for all: none has


class TwiceDifferentiable(TorchFunctionMode):
    """Replaces functions whose derivative torch cannot differentiate again by equal ones whose derivative it can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.hardsigmoid, torch._C._nn.hardsigmoid):
            return F.relu6(args[0] + 3) / 6
        if func is F.scaled_dot_product_attention and is_plain_attention(args, kwargs):
            q, k, v = args
            return attention_weights(q, k, kwargs.get("scale")) @ v
        return func(*args, **kwargs)


def is_plain_attention(args: tuple, kwargs: dict) -> bool:
    """Whether a call of F.scaled_dot_product_attention asks for no mask, dropout or causality."""
    asked = [value for name, value in kwargs.items() if name != "scale"]
    return len(args) == 3 and not any(isinstance(value, (Tensor, fx.Node)) or value for value in asked)


def attention_weights(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """softmax(scale q k^T); without a mask no row is empty, and torch's own check for that is saved."""
    return (q * attention_scale(q, scale) @ k.transpose(-2, -1)).softmax(-1)


def attention_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


class Window:
    """The sub-graph from a layer to the K-th counted operation after it (the paper's f_k(X; W), k = 0..K).

    It starts at the layer: nothing before it is recomputed. What the window needs that does not depend on the layer's
    weight (a shortcut branch, the other input of a concatenation) is computed once per micro-batch, by `enter`.
    Inside the window a BatchNorm is an affine map, folded into the convolution it follows, and attention uses the
    kernel that has second derivatives. `model` holds the weights of everything but the layers themselves.

    layers: those whose weights the features are a function of, in execution order; the window starts at the first.
    """

    def __init__(
        self,
        network: Network,
        layers: Sequence[Layer],
        k_step: int,
        model: nn.Module | None = None,
    ):
        self.network, self.layers, self.model = network, layers, network.model if model is None else model
        first = layers[0].node
        start = network.position[first]
        own = {name for each in self.layers for name in (each.parameter, each.bias)}
        varying = {n for n in network.nodes if n.op == "get_attr" and n.target in own}  # what depends on the weights
        varying |= {n for n in network.nodes for each in self.layers if network.reads(n, each.parameter)}
        counted = []
        for node in network.nodes[start:]:
            if node in varying or varying.intersection(node.all_input_nodes):
                varying.add(node)
                if network.is_counted(node) or (node is first and node not in network.pairs):
                    counted.append(node)
            if len(counted) > k_step:
                break
        self.features = counted  # K + 1 nodes, or fewer near the end of the network
        wanted = set(counted)
        for node in reversed(network.nodes[start : network.position[counted[-1]] + 1]):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        needed = [n for n in network.nodes if n in wanted]
        self.nodes = [n for n in needed if n in varying]
        side = [n for n in needed if n not in varying and network.position[n] > start]
        self.side_nodes = [n for n in side if n.op != "get_attr"]  # parameters are read where they are used
        self.inputs = {n for node in self.nodes for n in node.all_input_nodes if n not in varying}
        self.side_inputs = self.inputs.intersection(self.side_nodes)
        self.last_reads = last_reads(self.nodes, keep=self.features)
        self.folded = {n: network.batch_norm_of[n] for n in self.nodes if n in network.batch_norm_of}
        self.applied = set(self.folded.values())
        self.constants = self._fold_constants()
        self.biases = {
            each: self.folded_names(each.node)[1] if each.node in self.folded else each.bias for each in self.layers
        }
        self.varied = {each.parameter for each in self.layers} | {bias for bias in self.biases.values() if bias}

    def _fold_constants(self) -> dict[str, Tensor]:
        """Weights and biases of the window's convolutions, the BatchNorm after each folded in."""
        constants = {}
        for conv, batch_norm in self.folded.items():
            names, (scale, shift) = self.folded_names(conv), affine_of(self.norm(batch_norm))
            weight, bias = (attribute(self.model, name) for name in names)
            constants[names[0]] = weight * per_output(scale, weight)
            constants[names[1]] = shift if bias is None else shift + scale * bias
        return constants

    def folded_names(self, node: fx.Node) -> tuple[str, str]:
        """The names of the weight and the bias of a convolution that a BatchNorm is folded into."""
        mapped: Any = self.network.linear_maps[node]
        return mapped.weight, mapped.bias

    def norm(self, node: fx.Node) -> _BatchNorm | FixedNorm:
        """A BatchNorm with fixed statistics, with the window's weights."""
        return norm_of(node, self.model)

    def module(self, node: fx.Node) -> Any:
        """The module that a node calls, or None, with the window's weights."""
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def enter(self, values: Values) -> Values:
        """What the window reads, from the values at the cut; parameters as they are now."""
        if not all(node in values for node in self.side_inputs):
            values = {**values, **self.compute_side_inputs(values)}
        return {node: value_of(node, self.model, values, {}) for node in self.inputs}

    @torch.no_grad()
    def compute_side_inputs(self, values: Values) -> Values:
        """What the nodes compute that the window reads and the layer does not reach, from the values at the cut."""
        values = dict(values)
        for node in self.side_nodes:
            values[node] = run_node(node, self.model, values, {})
        return {node: values[node] for node in self.side_inputs}

    def __call__(self, values: Values, weights: Weights, bias_updates: BiasUpdates = None) -> list[Tensor]:
        """Features f_0 .. f_K at the layers' weights, one tensor (n, ...) for each counted operation.

        bias_updates: (out,) each, added to the layer's own output (before any BatchNorm), besides its bias.
        """
        values = self.run(self.nodes, values, self.parameters(weights, bias_updates))
        return [values[node] for node in self.features]

    def direction(self, weights: Weights, bias_updates: BiasUpdates = None) -> dict[str, Tensor]:
        """What the layers' weights and bias updates are in the window's parameters, by full name; linear in both."""
        moved = {}
        for layer, weight, update in zip(self.layers, weights, bias_updates or [None] * len(weights), strict=True):
            scale = self.output_scale(layer)
            moved[layer.parameter] = weight if scale is None else weight * per_output(scale, weight)
            bias = self.biases[layer]
            if update is not None and bias is not None:
                moved[bias] = update if scale is None else scale * update
        return moved

    def parameters(self, weights: Weights, bias_updates: BiasUpdates = None) -> dict[str, Tensor]:
        """The parameters that differ from the model's, by full name."""
        moved = self.direction(weights, bias_updates)
        for layer, bias in self.biases.items():
            if bias in moved:
                folded = layer.node in self.folded
                moved[bias] = moved[bias] + (self.constants[bias] if folded else self.model.get_parameter(bias))
        return {**self.constants, **moved}

    def output_scale(self, layer: Layer) -> Tensor | None:
        """The factor (out,) by which the BatchNorm after a layer scales its output; None without one."""
        batch_norm = self.folded.get(layer.node)
        return None if batch_norm is None else affine_of(self.norm(batch_norm))[0]

    def output(self, values: Values, weight: Tensor) -> Tensor:
        """The first layer's own output at `weight`, (n, out, ...), before any BatchNorm."""
        values, (first, *_) = dict(values), self.layers
        for node in self.nodes[: self.nodes.index(first.node) + 1]:
            values[node] = run_node(node, self.model, values, {first.parameter: weight})
        return values[first.node]

    def after(self, values: Values, output: Tensor) -> list[Tensor]:
        """The features as a function of the first layer's own output: the map that a preconditioner pulls back."""
        first = self.layers[0].node
        if first in self.folded:
            output = normalise(self.norm(self.folded[first]), output)
        later = [n for n in self.nodes if n is not first]
        values = self.run(later, {**values, first: output}, self.constants)
        return [values[node] for node in self.features]

    def run(self, nodes: list[fx.Node], values: Values, parameters: dict[str, Tensor]) -> Values:
        """`values` and what `nodes` compute from them."""
        values = dict(values)
        with differentiable():
            for node in nodes:
                values[node] = self.step(node, values, parameters)
        return values

    def step(self, node: fx.Node, values: Values, parameters: dict[str, Tensor]) -> Any:
        """What one node computes from `values`, BatchNorms being folded or affine maps."""
        if node in self.folded and node.op == "call_function":
            weight, bias = (parameters[name] for name in self.folded_names(node))
            return node.target(values[node.args[0]], weight, bias, **settings(node))
        if isinstance(self.module(node), nn.RNNBase):
            with unfused():
                return run_node(node, self.model, values, parameters)
        if node not in self.network.affine:
            return run_node(node, self.model, values, parameters)
        norm, x = self.norm(node), values[node.args[0]]
        x = x if node in self.applied else normalise(norm, x)
        if has_activation(norm):
            for name in ("drop", "act"):
                x = getattr(norm, name, nn.Identity())(x)
        return x

    def is_identity(self, node: fx.Node) -> bool:
        """Whether a node does nothing: a BatchNorm that is folded into the convolution in front of it."""
        return node in self.applied and not has_activation(self.norm(node))


def last_reads(nodes: list[fx.Node], keep: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, those of `nodes` that nothing reads any more once it has run, but for those to keep."""
    last = {read: node for node in nodes for read in node.all_input_nodes}
    reads: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for read, node in last.items():
        if read in reads and read not in keep:
            reads[node].append(read)
    return reads


@contextmanager
def differentiable():
    """Operations in the form that has the derivatives that products need."""
    with attention_by_parts(), sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
        yield


@contextmanager
def unfused():
    """Recurrent layers as the operations that they are made of: oneDNN's and cuDNN's kernels lack derivatives."""
    libraries = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        for library in libraries:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(libraries, before):
            library.enabled = enabled


def per_output(scale: Tensor, weight: Tensor) -> Tensor:
    """(out,) shaped to multiply a weight (out, ...)."""
    return scale.view(-1, *[1] * (weight.ndim - 1))


def affine_of(batch_norm: _BatchNorm | FixedNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (channels,), of a BatchNorm with fixed statistics."""
    scale = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    if batch_norm.weight is not None:
        scale = scale * batch_norm.weight
    shift = -batch_norm.running_mean * scale
    return scale, shift if batch_norm.bias is None else shift + batch_norm.bias


def normalise(batch_norm: _BatchNorm | FixedNorm, x: Tensor) -> Tensor:
    """The affine map of a BatchNorm with fixed statistics, applied to x (n, channels, ...)."""
    scale, shift = (vector.view(-1, *[1] * (x.ndim - 2)) for vector in affine_of(batch_norm))
    return torch.addcmul(shift, x, scale)
