"""A trace with real images, for forward passes that count, compare or unpack the sizes of what they compute.

A symbolic trace does not know a size: `assert h == 32`, `len(x)`, `*x.shape` and einops end it. Here every operation
runs as it is recorded, so that whatever is no tensor is the plain value that it would be. Only the number of images
must not become a constant: the network is traced with two (any_count.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from snows.errors import TraceError, first_line
from snows.network.any_count import COUNTS, for_any_count
from snows.network.trace import Tracer, Values, normal_form, run_node, trace

Example: TypeAlias = Tensor | Sequence[int] | Callable[[], Tensor] | None
FACTORIES = {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange}  # may make one for so many images
METHODS = (type(Tensor.add), type(Tensor.__getitem__))  # those of torch's in C
OPERATORS: dict[str, Callable] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
OPERATORS |= {"div": operator.truediv, "matmul": operator.matmul, "pow": operator.pow, "neg": operator.neg}
OPERATORS["__getitem__"] = operator.getitem
REFLECTED = {"__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rmatmul__": operator.matmul}
READINGS = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "tolist", "numpy"}  # numbers of a tensor's


class Value(Tensor, fx.Proxy):
    """A tensor on its way through a forward pass that a tracer records: the node that computes it, and its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # `Recording` sees to it
    __hash__ = Tensor.__hash__

    node: fx.Node
    tracer: ConcreteTracer

    @staticmethod
    def of(proxy: fx.Proxy, tensor: Tensor) -> Value:
        value = tensor.detach().as_subclass(Value)
        value.node, value.tracer = proxy.node, proxy.tracer
        return value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a tensor has no attribute {name}")

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])

    def __repr__(self) -> str:
        return f"Value({self.node})"


class Recording(TorchFunctionMode):
    """While it is entered, a tracer records each function of torch's that reads one of its values, and `functions`."""

    def __init__(self, tracer: ConcreteTracer, functions: set[Callable]):
        super().__init__()
        self.tracer, self.functions = tracer, functions

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = function in self.functions or any(isinstance(each, Value) for each in flat((args, kwargs)))
        if self.tracer.running or not reads:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__setitem__":
            return self.tracer.assign(*args)
        if name in READINGS:
            raise TraceError(f"what it does depends on what images show ({name})")
        if name == "__get__":
            return self.tracer.create_proxy("call_function", getattr, (*args, function.__self__.__name__), {})
        if not (is_tensor_method_or_property(function) or isinstance(function, METHODS)):
            return self.tracer.create_proxy("call_function", function, args, kwargs)
        if name in REFLECTED and not kwargs:
            return self.tracer.create_proxy("call_function", REFLECTED[name], args[::-1], {})
        if name in OPERATORS and not kwargs:
            return self.tracer.create_proxy("call_function", OPERATORS[name], args, {})
        return self.tracer.create_proxy("call_method", name, args, kwargs)


class ConcreteTracer(Tracer):
    """A tracer that runs what it records; what comes of it is a `Value` where it is a tensor, and itself where not.

    factories: record what makes tensors of zeros and the like too. They may be for so many images; but a module that is
        made in the forward pass makes its parameters so.
    """

    def __init__(self, images: Tensor, factories: bool):
        super().__init__()
        self.images, self.factories = images, factories
        self.values: Values = {}
        self.running = False

    def trace(self, root, concrete_args=None) -> fx.Graph:
        with Recording(self, FACTORIES if self.factories else set()):
            return super().trace(root, concrete_args)

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

    def assign(self, tensor: Tensor, place: Any, value: Any) -> None:
        """Record `tensor[place] = value`: who reads the tensor from here on reads a copy that it was written into."""
        if not isinstance(tensor, Value):
            raise TraceError("it writes what it computes into a tensor that is not of its own making")
        tensor.node = self.create_proxy("call_function", assigned, (tensor, place, value), {}).node

    def handed_on(self, proxy: fx.Proxy, value: Any) -> Any:
        """What the forward pass sees of a recorded value."""
        if isinstance(value, Tensor):
            return Value.of(proxy, value)
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


def assigned(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """A copy of a tensor, with a value written into a place of it."""
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def flat(args: Any) -> list[Any]:
    """What is in nested arguments."""
    found: list[Any] = []
    fx.node.map_aggregate(args, found.append)
    return found


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
            raise TraceError(f"{symbolic} Or give images: some such networks are traced with them.") from symbolic
        example = example() if callable(example) else example
        like = next(iter(model.parameters()), torch.zeros(()))
        image = example[:1] if isinstance(example, Tensor) else torch.zeros(1, *example)
        shape, image = "x".join(map(str, image.shape[1:])), image.to(like.device, like.dtype)
        for factories in (False, True):
            tracers = [ConcreteTracer(image.repeat(n, *[1] * (image.ndim - 1)), factories) for n in COUNTS]
            try:
                with torch.no_grad():
                    graphs = [tracer.trace(model) for tracer in tracers]
                return normal_form(for_any_count(graphs[0], graphs[1], model), model)
            except Exception as error:  # whatever a forward pass raises
                failed, place = error, next((f" in {each.failed_in}" for each in tracers if each.failed_in), "")
        raise TraceError(f"{symbolic} Nor with images of {shape}{place}: {first_line(failed)}") from failed
