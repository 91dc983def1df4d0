"""Which channels of a network must stand in one order: the dimensions of parameters that are permuted together.

A layer makes one set of its columns and of what it reads, a norm of its numbers and of the channels that it is applied
to, a residual sum of the rows of both its branches. The channels of a set may be put in any order, the same in each of
its slots, and the network computes the same function. Where an operation is not understood, or tells channels by their
number (a concatenation, the heads of an attention, the input, the output), the set's order is fixed. Tensors that
serve several times are in the sets of all their uses, which so become one.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor, fx, nn

from snows.masks.slots import FIXED, FUNCTIONS, METHODS, ONE, UNKNOWN, Slot, Slots, Value, flattened, pooled
from snows.network.known import ELEMENTWISE_MODULES, acts_elementwise, is_plain
from snows.network.network import Network
from snows.network.operations import LinearMap, norm_arguments

POOLS = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d}
MODULES = {*ELEMENTWISE_MODULES, *POOLS, nn.Identity, nn.Dropout, nn.Dropout2d, nn.LayerNorm, nn.RMSNorm, nn.Flatten}


class Coupling:
    """The slots of a network's parameters and buffers in sets, found by following its trace."""

    def __init__(self, network: Network):
        self.network, self.slots = network, Slots()
        self.tensors: dict[str, Tensor] = dict(network.model.named_parameters(remove_duplicate=False))
        self.tensors |= network.model.named_buffers(remove_duplicate=False)
        self.first_name: dict[int, str] = {}  # of a tensor that may have several
        for name, tensor in self.tensors.items():
            self.first_name.setdefault(id(tensor), name)
        self._fix_views()
        self.values: dict[fx.Node, Value] = {}
        for node in network.nodes:
            inputs = [self.values[read] for read in node.all_input_nodes]
            value = self._follow(node, inputs)
            self.values[node] = self._give_up(node, inputs) if value is None else value

    def slot(self, name: str, dim: int) -> Slot:
        """That of a dimension of a parameter or buffer."""
        tensor = self.tensors[name]
        return ONE if tensor.shape[dim] == 1 else (self.first_name[id(tensor)], dim)

    def _follow(self, node: fx.Node, inputs: list[Value]) -> Value | None:
        """What a node computes; None where that is not understood."""
        if node.op == "get_attr":
            tensor = self.tensors.get(node.target)
            return None if tensor is None else Value(tuple(self.slot(node.target, i) for i in range(tensor.ndim)))
        mapped = self.network.linear_maps.get(node)
        if mapped is not None:
            return self._linear_map(inputs[0], mapped)
        if node in self.network.affine:
            return self._batch_norm(node, inputs[0])
        if node.op == "call_module":
            return self._module(node, inputs)
        rule = (METHODS if node.op == "call_method" else FUNCTIONS).get(node.target)
        return rule(self.slots, node, inputs) if rule is not None and inputs else None

    def _give_up(self, node: fx.Node, inputs: list[Value]) -> Value:
        """Fix the order of all that a node reads."""
        for value in inputs:
            self.slots.fix(value, range(len(value.slots)))
        for name in self._held(node.target) if node.op == "call_module" else ():
            self._fix(name)
        return UNKNOWN

    def _linear_map(self, source: Value, mapped: LinearMap) -> Value | None:
        """The columns are the channels that are read, the rows those that are written; both, of depthwise filters."""
        weight, convolution = self.tensors.get(mapped.weight), mapped.convolution
        if weight is None or mapped.bias is None or (convolution is None) != (weight.ndim == 2):
            return None
        read, rows = source.slot(-1 if convolution is None else -3), self.slot(mapped.weight, 0)
        groups = 1 if convolution is None else convolution.groups
        if groups == 1:
            self.slots.unite(read, self.slot(mapped.weight, 1))
        elif groups == weight.shape[0] and weight.shape[1] == 1:
            self.slots.unite(read, rows)
        else:
            self.slots.unite(FIXED, read, rows)
        if mapped.bias in self.tensors:
            self.slots.unite(rows, self.slot(mapped.bias, 0))
        if convolution is None:
            return Value((*source.slots[:-1], rows), source.whole)
        pointwise = convolution.kernel_size == (1, 1) and convolution.padding == (0, 0)
        positions = [ONE if pointwise and source.slot(dim) == ONE else FIXED for dim in (-2, -1)]
        return Value((*(source.slots[:-3] if source.whole else (FIXED,)), rows, *positions))

    def _batch_norm(self, node: fx.Node, source: Value) -> Value | None:
        module = self.network.module(node)
        if module is not None:
            return self._joined(source, 1, self._held(node.target)) if acts_elementwise(module) else None
        return self._joined(source, 1, [tensor.target for tensor in norm_arguments(node)[0] if tensor is not None])

    def _module(self, node: fx.Node, inputs: list[Value]) -> Value | None:
        """What a module other than a linear map or a BatchNorm computes."""
        module, source = self.network.module(node), inputs[0]
        if not is_plain(module, MODULES) or len(inputs) > 1:
            return None
        if isinstance(module, nn.Flatten):
            return flattened(self.slots, source, module.start_dim, module.end_dim)
        if type(module) in POOLS:
            indices = getattr(module, "return_indices", False)
            return None if indices else pooled(self.slots, source, getattr(module, "output_size", None))
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) > 1:
            return None
        held = self._held(node.target)  # a norm's, or the slopes of a PReLU
        return self._joined(source, 1 if isinstance(module, nn.PReLU) else -1, held) if held else source

    def _joined(self, source: Value, dim: int, names: list[str]) -> Value | None:
        """A value of which one dimension is that of these tensors, which hold a number for each channel."""
        if len(source.slots) < 1 or (dim >= 0 and not source.whole):
            return None
        read = source.slots[dim] if dim < len(source.slots) else FIXED
        self.slots.unite(read, *(self.slot(name, 0) for name in names if self.tensors[name].ndim))
        return source

    def _held(self, module: str) -> list[str]:
        """The names of all the tensors of a module."""
        return [name for name in self.tensors if name.startswith(f"{module}.")]

    def _fix(self, name: str) -> None:
        self.slots.unite(FIXED, *(self.slot(name, dim) for dim in range(self.tensors[name].ndim)))

    def _fix_views(self) -> None:
        """Fix tensors that see the same memory as others."""
        own = {id(tensor): tensor for tensor in self.tensors.values() if tensor.numel()}
        holders = Counter(tensor.untyped_storage().data_ptr() for tensor in own.values())
        for tensor in own.values():
            if holders[tensor.untyped_storage().data_ptr()] > 1:
                self._fix(self.first_name[id(tensor)])
