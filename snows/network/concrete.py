"""A trace with real images, for forward passes that count, compare or unpack the sizes of what they compute.

A symbolic trace does not know a size: `assert h == 32`, `len(x)`, `*x.shape` and einops end it. Here every operation
runs as it is recorded, so that whatever is no tensor is the plain value that it would be. Only the number of images
must not become a constant. So the network is traced with two numbers of images, and a whole number that differs between
the two records is so many times the number of images.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from snows.errors import TraceError, first_line
from snows.network.trace import Tracer, Values, fetch, normal_form, run_node, trace

Example: TypeAlias = Tensor | Sequence[int] | Callable[[], Tensor] | None
COUNTS = (2, 3)  # images that a network is traced with; no whole multiple of the one is the same multiple of the other


class Value(fx.Proxy):
    """A tensor on its way through a forward pass: recorded by a tracer, and known to it."""

    __class__ = Tensor  # to isinstance, as in the forward pass itself

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.tracer.values[self.node], name)
        if isinstance(found, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if not callable(found):
            return found
        return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])


class ConcreteTracer(Tracer):
    """A tracer that runs what it records; what comes of it is a `Value` where it is a tensor, and itself where not."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images
        self.values: Values = {}
        self.running = False

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *others: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **options)
        if kind == "placeholder":
            value = self.images
        else:
            self.running = True
            try:
                value = run_node(proxy.node, self.root, self.values, {})
            finally:
                self.running = False
        self.values[proxy.node] = value
        return self.handed_on(proxy, value)

    def handed_on(self, proxy: fx.Proxy, value: Any) -> Any:
        """What the forward pass sees of a recorded value."""
        if isinstance(value, Tensor):
            return proxy
        if isinstance(value, dict):
            return {key: self.part(proxy, key, each) for key, each in value.items()}
        if isinstance(value, (tuple, list)) and any(isinstance(each, (Tensor, tuple, list)) for each in value):
            parts = [self.part(proxy, i, each) for i, each in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        self.graph.erase_node(proxy.node)
        return value

    def part(self, proxy: fx.Proxy, key: Any, value: Any) -> Any:
        if not isinstance(value, (Tensor, tuple, list, dict)):
            return value
        return self.create_proxy("call_function", operator.getitem, (proxy, key), {})

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(module, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)


def trace_somehow(model: nn.Module, example: Example) -> list[fx.Node]:
    """The operations of a model, traced with symbols; where that fails, with real images.

    example: images (n, channels, height, width), of which the first is looked at, or what gives them; or the shape of
        one.

    Raises:
        TraceError: it can be traced in neither way.
    """
    try:
        return trace(model)
    except TraceError as symbolic:
        if example is None:
            raise
        example = example() if callable(example) else example
        like = next(iter(model.parameters()), torch.zeros(()))
        image = example[:1] if isinstance(example, Tensor) else torch.zeros(1, *example)
        shape, image = "x".join(map(str, image.shape[1:])), image.to(like.device, like.dtype)
        tracers = [ConcreteTracer(image.repeat(count, *[1] * (image.ndim - 1))) for count in COUNTS]
        try:
            with torch.no_grad():
                graphs = [tracer.trace(model) for tracer in tracers]
            return normal_form(for_any_count(graphs[0], graphs[1], model), model)
        except Exception as error:  # whatever a forward pass raises
            place = next((f" in {tracer.failed_in}" for tracer in tracers if tracer.failed_in), "")
            raise TraceError(f"{symbolic} Nor with images of {shape}{place}: {first_line(error)}") from error


def for_any_count(first: fx.Graph, second: fx.Graph, model: nn.Module) -> fx.Graph:
    """The graph of any number of images, from those of COUNTS.

    Raises:
        TraceError: they do more than count images differently.
    """
    for graph in (first, second):
        for node in reversed(graph.nodes):
            if node.target is operator.getitem and not node.users:
                graph.erase_node(node)  # a part that nothing reads
    merge = Merge(first, model)
    if len(first.nodes) != len(second.nodes):
        raise TraceError("other operations with another number of images")
    for ours, other in zip(list(first.nodes), list(second.nodes)):
        merge.add(ours, other)
    return first


class Merge:
    """Two records of a forward pass, the second with more images, as one, node by node."""

    def __init__(self, graph: fx.Graph, model: nn.Module):
        self.graph, self.model = graph, model
        self.images = next(iter(graph.nodes))
        self.twin: dict[fx.Node, fx.Node] = {}
        self.multiples: dict[int, fx.Node] = {}

    def add(self, ours: fx.Node, other: fx.Node) -> None:
        """Make a node of the first record that of any number of images."""
        self.twin[other] = ours
        same = ours.op == other.op and ours.target == other.target
        if ours.op == other.op == "get_attr" and not same:  # tensors that the forward pass makes
            same = torch.equal(fetch(self.model, ours.target), fetch(self.model, other.target))
        if not same:
            raise TraceError(f"{ours.name} is another with another number of images")
        ours.args, ours.kwargs = self.of(ours.args, other.args), self.of(ours.kwargs, other.kwargs)

    def of(self, ours: Any, other: Any) -> Any:
        """What stands for an argument, given as in the two records."""
        if isinstance(ours, fx.Node):
            if self.twin.get(other) is not ours:
                raise TraceError(f"{ours.name} is read elsewhere with another number of images")
            return ours
        if isinstance(ours, (tuple, list)) and len(ours) == len(other):
            return type(ours)(self.of(*pair) for pair in zip(ours, other))
        if isinstance(ours, dict) and ours.keys() == other.keys():
            return {key: self.of(each, other[key]) for key, each in ours.items()}
        if isinstance(ours, slice):
            return slice(*(self.of(getattr(ours, k), getattr(other, k)) for k in ("start", "stop", "step")))
        if ours == other:
            return ours
        times, left = divmod(ours, COUNTS[0]) if isinstance(ours, int) else (0, 1)
        if left or other != times * COUNTS[1]:
            raise TraceError(f"a number is {ours} with {COUNTS[0]} images and {other} with {COUNTS[1]}")
        return self.multiple(times)

    def multiple(self, times: int) -> fx.Node:
        """The node that counts so many for each image."""
        if times not in self.multiples:
            before = self.images if times == 1 else self.multiple(1)
            with self.graph.inserting_after(before):
                self.multiples[times] = (
                    self.graph.call_method("size", (self.images, 0))
                    if times == 1
                    else self.graph.call_function(operator.mul, (before, times))
                )
        return self.multiples[times]
