"""The tangent pass: the derivative of a window's features along a direction of its layer's weight.

Once a window is linearised, every operation in it is a linear map of its inputs' tangents. A convolution or linear map
is applied to the tangent as it is; an activation multiplies it by its slope, taken once; a sum adds. None of these
computes anything of the forward pass again, nor does attention, whose weights are kept, so that the tangent pass costs
about one forward pass, the least it can. The other operations (LayerNorm, products, reshapes, masked attention) go
through torch's forward mode, which repeats them; those that lack one, through their backward pass, differentiated.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import grad
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from snows.network.known import ELEMENTWISE, ELEMENTWISE_FUNCTIONS, ELEMENTWISE_MODULES, acts_elementwise, is_plain
from snows.network.operations import settings
from snows.network.trace import Values, run_node
from snows.network.window import (
    BiasUpdates,
    Weights,
    Window,
    attention_scale,
    attention_weights,
    differentiable,
    is_plain_attention,
)

LINEAR_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Tangent = Any  # a tensor, a tuple of them, or None: no dependence on the weight
Direction = dict[str, Tensor]  # what the direction is in the window's parameters, by their full names
Rule = Callable[[dict[fx.Node, Tangent], Direction], Tangent]  # the tangents so far -> the tangent of one node


class Tangents:
    """v -> J v: the tangents of f_0 .. f_K along a direction of the layers' weights and bias updates.

    No rule refers to this object: in a cycle, what the rules keep would outlive its use.

    values: what all of the window's nodes computed for one micro-batch, and what they read.
    parameters: of the window, at the weight where it is linearised.
    """

    def __init__(self, window: Window, values: Values, parameters: dict[str, Tensor]):
        first_use()
        self.window = window
        self.parameters = tree_map_only(Tensor, Tensor.detach, parameters)
        values = tree_map_only(Tensor, Tensor.detach, values)
        with differentiable():
            self.rules = {node: self._rule(node, values) for node in window.nodes}

    def __call__(self, weights: Weights, bias_updates: BiasUpdates = None) -> list[Tensor | None]:
        """One tangent (n, ...) for each feature; None where the feature does not depend on the weight's values."""
        direction, tangents = self.window.direction(weights, bias_updates), dict[fx.Node, Tangent]()
        with torch.no_grad(), differentiable(), forward_mode.dual_level():
            for node, rule in self.rules.items():
                tangent = rule(tangents, direction)
                if any(part is not None for part in tree_leaves(tangent)):
                    tangents[node] = tangent
                for read in self.window.last_reads[node]:
                    tangents.pop(read, None)
        return [tangents.get(node) for node in self.window.features]

    def _rule(self, node: fx.Node, values: Values) -> Rule:
        """How the tangent of a node follows from those of its inputs; it keeps no more of `values` than it needs."""
        module = self.window.module(node)
        if is_plain(module, LINEAR_MODULES) and len(node.all_input_nodes) == 1:
            return self._linear_module(node, values)
        if node.target in (F.linear, F.conv2d) and all(isinstance(read, fx.Node) for read in node.args[:2]):
            return self._linear_function(node, values)
        if self.window.is_identity(node):
            return lambda tangents, direction: tangents.get(node.args[0])
        if self._is_elementwise(node):
            return self._elementwise(node, values)
        plain_sum = node.target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs
        if plain_sum and isinstance(values[node], Tensor):
            return self._sum(node, values)
        if node.target is F.scaled_dot_product_attention and is_plain_attention(node.args, node.kwargs):
            return self._attention(node, values)
        return self._forward_mode(node, values)

    def _is_elementwise(self, node: fx.Node) -> bool:
        """Whether a node is known to do the same to every number of its one input (a slope may move as well)."""
        if node in self.window.network.affine:
            return acts_elementwise(self.window.norm(node))
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_method":
            return node.target in ELEMENTWISE
        return is_plain(self.window.module(node), ELEMENTWISE_MODULES) or node.target in ELEMENTWISE_FUNCTIONS

    def _linear_module(self, node: fx.Node, values: Values) -> Rule:
        (source,), model = node.args, self.window.model
        weight, bias = f"{node.target}.weight", f"{node.target}.bias"
        module = self.window.module(node)
        own = {weight: self.parameters.get(weight, module.weight)}
        # The map itself, without its bias; a folded BatchNorm gives one to a convolution that has none.
        no_bias = {bias: own[weight].new_zeros(len(own[weight]))}
        if module.bias is None and bias not in self.parameters:
            no_bias = {}
        x = values[source] if weight in self.window.varied else None

        def rule(tangents, direction):
            parts = []
            if source in tangents:
                parts.append(run_node(node, model, tangents, {**own, **no_bias}))
            if x is not None:  # the layer itself, linear in its weight
                parts.append(run_node(node, model, {source: x}, {**no_bias, **direction}))
            return total(parts)

        return rule

    def _linear_function(self, node: fx.Node, values: Values) -> Rule:
        """F.linear or F.conv2d, of which input, weight and bias may move."""
        source, weight, *biases = node.args[:3]
        bias, shape = biases[0] if biases else None, values[node].shape
        asked = fx.map_arg(settings(node), values.__getitem__)
        column = (-1, *[1] * (len(shape) - 2)) if node.target is F.conv2d else (-1,)  # a bias beside the output
        x = values[source] if weight in self.window.nodes else None
        folded = self.window.folded_names(node) if node in self.window.folded else None  # numbers of the window's alone
        fixed_weight = values[weight] if folded is None else self.parameters[folded[0]]

        def rule(tangents, direction):
            moved, moved_bias = tangents.get(weight), tangents.get(bias)
            if folded is not None:
                moved, moved_bias = (direction.get(name) for name in folded)
            parts = [node.target(tangents[source], fixed_weight, **asked)] if source in tangents else []
            if moved is not None:
                parts.append(node.target(x, moved, moved_bias, **asked))
            elif moved_bias is not None:
                parts.append(moved_bias.view(column).expand(shape))
            return total(parts)

        return rule

    def _elementwise(self, node: fx.Node, values: Values) -> Rule:
        source = node.all_input_nodes[0]  # of a BatchNorm's function, before its parameters
        with torch.enable_grad():
            x = values[source].requires_grad_()
            (slope,) = grad(self.window.step(node, {**values, source: x}, self.parameters).sum(), x)
        return lambda tangents, direction: tangents[source] * slope if source in tangents else None

    def _sum(self, node: fx.Node, values: Values) -> Rule:
        shape, dtype = values[node].shape, values[node].dtype

        def rule(tangents, direction):
            parts = [tangents[term] for term in node.args if isinstance(term, fx.Node) and term in tangents]
            return total(parts).expand(shape).to(dtype) if parts else None

        return rule

    def _attention(self, node: fx.Node, values: Values) -> Rule:
        """P v with P = softmax(S), S = scale q k^T: the tangent of P is P * (S' - <P, S'>), row by row."""
        q, k, v = (values[each] for each in node.args)
        asked = node.kwargs.get("scale")
        scale = attention_scale(q, values[asked] if isinstance(asked, fx.Node) else asked)
        weights = attention_weights(q, k, scale)
        q, k = q * scale, k * scale

        def rule(tangents, direction):
            dq, dk, dv = (tangents.get(each) for each in node.args)
            parts = [] if dv is None else [weights @ dv]
            scores = [] if dq is None else [dq @ k.transpose(-2, -1)]
            scores += [] if dk is None else [q @ dk.transpose(-2, -1)]
            if scores:
                moved = weights * total(scores)
                parts.append((moved - weights * moved.sum(-1, keepdim=True)) @ v)
            return total(parts)

        return rule

    def _forward_mode(self, node: fx.Node, values: Values) -> Rule:
        window, parameters = self.window, self.parameters
        inputs = {read: values[read] for read in node.all_input_nodes}
        own = [name for name in sorted(window.varied) if window.network.reads(node, name)]

        def step(moving: dict[Any, Any]) -> Any:
            named = {name: value for name, value in moving.items() if isinstance(name, str)}
            return window.step(node, {**inputs, **moving}, {**parameters, **named})

        def rule(tangents, direction):
            moved = {read: tangents[read] for read in inputs if read in tangents}
            moved |= {name: direction[name] for name in own if name in direction}
            if not own and not moved:
                return None
            primals = {each: inputs[each] if each in inputs else parameters[each] for each in moved}
            try:
                return tree_map(tangent_of, step(tree_map(dual, primals, moved)))
            except NotImplementedError as error:
                try:
                    return by_double_backward(step, primals, moved)
                except RuntimeError:
                    raise error from None  # which names the operation

        return rule


@torch.enable_grad()
def by_double_backward(function: Callable[[Any], Any], primals: Any, tangents: Any) -> Any:
    """The tangents J v of a function that has no forward mode: J^T u is linear in u, and its derivative J.

    Raises:
        RuntimeError: its backward pass has no derivative, or only seems to: <u, J v> is not <J^T u, v>.
    """
    moved = [tangent for tangent in tree_leaves(tangents) if tangent is not None]
    pairs = zip(tree_leaves(primals), tree_leaves(tangents), strict=True)
    leaves = iter([leaf.detach().requires_grad_(tangent is not None) for leaf, tangent in pairs])
    primals = tree_map(lambda leaf: next(leaves), primals)
    result = function(primals)
    sources = [leaf for leaf in tree_leaves(primals) if leaf.requires_grad]
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    signs = [torch.ones_like(output).flatten().cumsum(0).cos().sign().view_as(output) for output in outputs]  # some u
    weights = [u.requires_grad_() for u in signs]
    pulled = grad(outputs, sources, weights, create_graph=True, materialize_grads=True)
    found = grad(pulled, weights, moved)
    there, back = (sum(map(dot, *pairs)).item() for pairs in ((weights, found), (pulled, moved)))
    if abs(there - back) > 1e-2 * max(abs(back), *(tangent.norm().item() for tangent in found)):
        raise RuntimeError("the backward pass hides some of its derivative")
    by_output = {id(output): tangent for output, tangent in zip(outputs, found)}
    return tree_map(lambda leaf: by_output.get(id(leaf)), result)


def dot(first: Tensor, second: Tensor) -> Tensor:
    return torch.dot(first.flatten(), second.flatten())


@cache
def first_use() -> None:
    """Use torch's forward mode once without its warning, there, that it still compiles with torch.jit.script itself."""
    with warnings.catch_warnings(), forward_mode.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_mode.make_dual(torch.zeros(1), torch.zeros(1))


def total(parts: list[Tensor]) -> Tensor | None:
    """Their sum; None of no parts."""
    return sum(parts[1:], parts[0]) if parts else None


def dual(value: Any, tangent: Tensor | None) -> Any:
    return value if tangent is None else forward_mode.make_dual(value, tangent)


def tangent_of(value: Any) -> Tensor | None:
    return forward_mode.unpack_dual(value).tangent if isinstance(value, Tensor) else None
