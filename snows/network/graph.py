"""A model as nodes in execution order: after the trace the engine knows no architectures."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snows.network.attention import is_output
from snows.network.known import ACTIVATION_MODULES, ACTIVATIONS, has_activation, is_zero, prunable_weights
from snows.network.operations import HIDING, LinearMap, attribute, called, is_fixed_norm, linear_map, norm_of
from snows.network.trace import Values, run_node

# The operations that the paper counts (DESIGN: convolution, linear, attention, activation, normalisation).
COUNTED_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear),
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d, nn.LocalResponseNorm),
    *ACTIVATION_MODULES,
)
LINEAR_MAPS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "scaled_dot_product_attention"}
NORMS = {"layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "local_response_norm"}
COUNTED_FUNCTIONS = ACTIVATIONS | LINEAR_MAPS | NORMS | HIDING | {"multi_head_attention_forward"}


class Graph:
    """A traced model: its `nodes`, and what is known of each.

    `calls` counts each module's calls. `linear_maps` and `affine`: the linear maps on parameters, and the BatchNorms
    with fixed statistics, modules or functions; `batch_norm_of`: convolutions that are folded with one. `pairs`: what
    returns several values, known once images have passed. `idle`: the parameters that no node reads.
    """

    def __init__(self, model: nn.Module, nodes: list[fx.Node]):
        self.model, self.nodes = model, nodes
        self.position = {node: i for i, node in enumerate(nodes)}
        self.input = nodes[0]
        self.output = nodes[-1].args[0]
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in nodes}
        self.by_target: dict[str, list[fx.Node]] = {}  # what calls a module, or reads a parameter
        for node in nodes:
            if node.op in ("call_module", "get_attr"):
                self.by_target.setdefault(node.target, []).append(node)
        self.calls = Counter(node.target for node in nodes if node.op == "call_module")
        self.owners = owners_of(model)
        self.pairs: set[fx.Node] = set()
        maps = {node: linear_map(node, model) for node in nodes}
        self.linear_maps: dict[fx.Node, LinearMap] = {node: each for node, each in maps.items() if each is not None}
        self.affine = {node for node in nodes if is_fixed_norm(node, model)}
        self.batch_norm_of = self.pair_batch_norms()
        self.idle = self._unread_parameters()

    def module(self, node: Any) -> Any:
        """The module that a node calls, or None."""
        return called(node, self.model)

    def is_counted(self, node: fx.Node) -> bool:
        """Whether the paper counts this node as an operation. A BatchNorm after a convolution is part of it."""
        if node in self.pairs:
            return False  # but what is read of it is
        if node in self.batch_norm_of.values():
            norm = norm_of(node, self.model)
            return has_activation(norm) and not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, nn.MultiheadAttention):
                return False  # but its output is, the first of the pair that it returns
            return isinstance(module, COUNTED_MODULES) or any(True for _ in prunable_weights(module))
        if node.target is operator.getitem:
            source = node.args[0]
            return source in self.pairs or (is_output(node) and isinstance(self.module(source), nn.MultiheadAttention))
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in COUNTED_FUNCTIONS

    def walk(
        self, nodes: Iterable[fx.Node], model: nn.Module, values: Values, parameters: dict[str, Tensor]
    ) -> Iterator[fx.Node]:
        """Run nodes in order, each with its value in `values` when it is given; then what no later node reads goes.

        parameters: what to compute with in place of the model's own.
        """
        for node in nodes:
            values[node] = run_node(node, model, values, parameters)
            yield node
            for read in node.all_input_nodes:
                if self.last_use[read] <= self.position[node]:
                    values.pop(read, None)

    def reads(self, node: fx.Node, parameter: str) -> bool:
        """Whether a node uses the parameter itself (a module may be called more than once)."""
        if node.op == "call_module":
            return parameter.startswith(node.target + ".")
        return node.op == "get_attr" and node.target == parameter

    def users(self, parameter: str) -> list[fx.Node]:
        """The modules that own a parameter and the functions that read it, in execution order."""
        parts = parameter.split(".")
        paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
        reading = [node for path in paths for node in self.by_target.get(path, ())]
        found = {user for node in reading for user in (node.users if node.op == "get_attr" else [node])}
        return sorted(found, key=self.position.__getitem__)

    def is_shared(self, parameter: str) -> bool:
        """Whether a parameter belongs to several modules (tied weights)."""
        return self.owners[id(self.model.get_parameter(parameter))] > 1

    def pair_batch_norms(self) -> dict[fx.Node, fx.Node]:
        """Convolutions whose only user is a BatchNorm with fixed statistics, their weight and bias read by no one else.

        Not one that multiplies by zero, as residual branches are initialised: its output tells nothing of its input.
        Nor one after a linear map, which takes tokens for channels where there are any.
        """
        pairs = {}
        for node in self.nodes:
            producer: Any = node.args[0] if node.args else None
            mapped = self.linear_maps.get(producer) if node in self.affine else None
            if mapped is None or mapped.convolution is None or mapped.bias is None:
                continue
            read = [user for name in (mapped.weight, mapped.bias) for user in self.users(name)]
            once = set(read) == {producer} and len(producer.users) == 1
            if once and not is_zero(norm_of(node, self.model).weight):
                pairs[producer] = node
        return pairs

    def _unread_parameters(self) -> list[str]:
        """The parameters that the forward pass does not use: an auxiliary head's, say."""
        read = set()
        for target in self.by_target:
            held = attribute(self.model, target)
            read |= {id(each) for each in (held.parameters() if isinstance(held, nn.Module) else [held])}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) not in read]


def owners_of(model: nn.Module) -> Counter:
    """How many modules own each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
