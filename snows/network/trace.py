"""A model as a list of operations: its trace, free of in-place writes, and how to run one of its nodes."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Conv2dSame, pad_same
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from snows.errors import TraceError
from snows.network.attention import encode, is_encoder_without_masks, open_attention
from snows.network.known import NAMESPACES, attributes
from snows.network.logits import logits_of

Values = dict[fx.Node, Any]  # what each node computed, for one micro-batch: tensors, but also plain integers

IN_PLACE_OPERATORS = {
    getattr(operator, "i" + name): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
}
# What computes something else than its in-place namesake: truth values, or samples with its input for probabilities.
NO_TWINS = {"eq", "ne", "lt", "le", "gt", "ge", "not_equal", "less", "less_equal", "greater", "greater_equal"}
NO_TWINS |= {"logical_not", "logical_and", "logical_or", "logical_xor", "bernoulli"}
# What functions read, in order.
INPUTS: dict[Any, tuple[str, ...]] = dict.fromkeys((F.linear, F.conv2d), ("input", "weight", "bias"))
INPUTS[F.batch_norm] = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
INPUTS |= {F.scaled_dot_product_attention: ("query", "key", "value"), F.hardsigmoid: ("input",)}
ANY_LAYOUT = {"view": "reshape", "view_as": "reshape_as"}  # the same shapes, of values in any order in memory


# What is asked of a parameter's shape, which is known: attributes, and methods.
SHAPES = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_floating_point"}


class Tracer(fx.Tracer):
    """fx's tracer, with the leaves that timm and torchvision ask for, and a memory of where it failed.

    timm's convolution with "same" padding is no leaf, but a padding and a convolution; nor are torch's encoders.
    """

    def __init__(self):
        wrapped = (*get_notrace_functions(), pad_same)
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=wrapped)
        self.leaves = tuple(get_notrace_modules())
        self.failed_in: str | None = None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """The images alone: whatever else forward() takes (masks, say) keeps its defaults, as in model(images)."""
        (first, *_) = inspect.signature(self.root.forward).parameters
        return lambda images: logits_of(self.root.forward(images)), [self.create_proxy("placeholder", first, (), {})]

    def trace(self, root, concrete_args=None) -> fx.Graph:
        """The graph, in which a function that torch.jit compiled is one operation: called with proxies, it crashes."""
        compiled, call = torch.jit.ScriptFunction, torch.jit.ScriptFunction.__call__

        def recorded(function: Any, *args: Any, **kwargs: Any) -> Any:
            proxies: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
            if proxies:
                return self.create_proxy("call_function", function, args, kwargs)
            return call(function, *args, **kwargs)

        compiled.__call__ = recorded
        try:
            with forgetting(root):
                return super().trace(root, concrete_args)
        finally:
            compiled.__call__ = call

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.DataParallel) or type(module) is Conv2dSame:
            return False
        return isinstance(module, self.leaves) or super().is_leaf_module(module, name)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Parameter) and not any(a is own for own in self.root.parameters()):
            a = a.detach()  # of a module that is made in the forward pass: a constant
        return super().create_arg(a)

    def holds(self, module: nn.Module) -> bool:
        return any(module is own for own in self.root.modules())

    def call_module(self, module, forward, args, kwargs):
        if not self.holds(module):
            return forward(*args, **kwargs)  # made in the forward pass: what it calls is recorded
        try:
            if is_encoder_without_masks(module, args, kwargs):
                return encode(module, *args, **kwargs)
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            # The innermost module sees the exception first and is the one to name.
            self.failed_in = self.failed_in or f"{self.path_of_module(module)} ({type(module).__name__})"
            raise


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """What a forward pass keeps of the trace for the next one, in plain attributes of its modules, is afterwards gone.

    Else a value of the trace would be read by who runs the model, or traces it again.
    """
    before = [(module, {name: kept(value) for name, value in attributes(module).items()}) for module in model.modules()]
    try:
        yield
    finally:
        for module, values in before:
            for name, value in attributes(module).items():
                if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                    del vars(module)[name]
                    vars(module).update({name: values[name]} if name in values else {})


def kept(value: Any) -> Any:
    """What remains of an attribute's value where a forward pass writes into it."""
    return copy.copy(value) if type(value) in (dict, list, set) else value


def trace(model: nn.Module) -> list[fx.Node]:
    """The operations of `model`, a module in evaluation mode, in execution order and free of in-place writes.

    Raises:
        TraceError: the forward pass cannot be traced, or takes or returns more than one tensor.
    """
    tracer = Tracer()
    try:
        inspect.signature(model.forward).bind("images")
    except TypeError as error:
        raise TraceError(f"cannot trace {type(model).__name__}: its forward() needs more than the images.") from error
    try:
        graph = tracer.trace(model)
    except Exception as error:
        place = tracer.failed_in or f"the model itself ({type(model).__name__})"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"cannot trace {place}: {reason}. SNOWS needs a forward pass without data-dependent control flow; "
            f"wrap that part with torch.fx.wrap or register it with timm.models.register_notrace_module."
        ) from error
    return normal_form(graph, model)


def normal_form(graph: fx.Graph, model: nn.Module) -> list[fx.Node]:
    """The operations of a traced graph as the engine wants them.

    Raises:
        TraceError: it returns more than one tensor.
    """
    fold_shapes(graph, model)
    make_positional(graph, model)
    open_attention(graph, model)
    make_out_of_place(graph, model)
    nodes = list(graph.nodes)
    if not isinstance(nodes[-1].args[0], fx.Node):
        raise TraceError(
            f"cannot prune {type(model).__name__}: its forward() must return one tensor, the logits, or "
            f"something with an entry or attribute named logits."
        )
    return nodes


def fold_shapes(graph: fx.Graph, model: nn.Module) -> None:
    """Make constants of the shapes of parameters, and of what is counted from these: no use of the parameters."""
    known: Values = {}
    for node in list(graph.nodes):
        source, *others = node.all_input_nodes or [None]
        name = node.args[1] if node.target is getattr else node.target
        counts = node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "math")
        if source is not None and source.op == "get_attr" and not others and name in SHAPES:
            known[node] = run_node(node, model, {}, {})
        elif counts and node.all_input_nodes and all(read in known for read in node.all_input_nodes):
            known[node] = run_node(node, model, known, {})
    for node in graph.nodes:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda read: known.get(read, read))
    for node in reversed(known):
        graph.erase_node(node)


def make_positional(graph: fx.Graph, model: nn.Module) -> None:
    """Give modules, linear maps and attention what they read by position, where it is looked for."""
    for node in graph.nodes:
        names = INPUTS.get(node.target, ())
        if node.op == "call_module":
            names = tuple(inspect.signature(model.get_submodule(node.target).forward).parameters)
        for name in names[len(node.args) :]:
            if name not in node.kwargs:
                break
            node.args = (*node.args, node.kwargs[name])
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != name}


def make_out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Replace every in-place operation, so that a value never changes once it is computed.

    Without this a feature (a BatchNorm's output, say) is overwritten by the in-place ReLU after it. Whoever reads the
    overwritten value later must read the result of the operation instead, which is what it would have seen.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        overwritten = without_writing(node, model)
        for user in list(overwritten.users) if overwritten is not None else []:
            if position[user] > position[node]:
                user.replace_input_with(overwritten, node)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def without_writing(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """Let a node that writes into a value compute the same without; returns the node of that value, or None."""
    overwritten = next(iter(node.all_input_nodes), None)
    if node.op == "call_module":  # the module itself is switched by the caller
        return overwritten if getattr(model.get_submodule(node.target), "inplace", False) is True else None
    if node.op == "call_method":
        name, spaces = node.target, [Tensor]
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        spaces = [space for space in NAMESPACES if getattr(space, name, None) is node.target]
    else:
        return None
    if node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
    elif node.kwargs.get("inplace", False) is True:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif spaces and isinstance(node.kwargs.get("out"), fx.Node):
        overwritten = node.kwargs["out"]
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    elif spaces and name.endswith("_") and not name.endswith("__"):
        write = getattr(spaces[0], name, None)
        twins = (getattr(space, name[:-1], None) for space in (spaces if node.op == "call_method" else NAMESPACES))
        twin = next(filter(callable, twins), None)
        if write is not None and (twin is None or name[:-1] in NO_TWINS):  # zero_, copy_, fill_, ...
            node.op, node.target = "call_function", on_a_copy(write)
        else:
            node.target = name[:-1] if node.op == "call_method" else twin
    else:
        return None
    return overwritten


def on_a_copy(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What a function computes that writes into its first argument, which here stays as it is."""

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return write(x.clone(), *args, **kwargs)

    return function


def run_node(node: fx.Node, model: nn.Module, values: Values, parameters: dict[str, Tensor]) -> Any:
    """Run one node on the values of its inputs; `parameters` overrides the model's, by full name."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: value_of(read, model, values, parameters))
    match node.op:
        case "get_attr":
            return value_of(node, model, values, parameters)
        case "call_function":
            return node.target(*args, **kwargs)
        case "call_method":
            numbers = any(isinstance(arg, torch.dtype) for arg in args)  # a view of the same bytes as other numbers
            name = node.target if numbers or kwargs else ANY_LAYOUT.get(node.target, node.target)
            return getattr(args[0], name)(*args[1:], **kwargs)
        case "call_module":
            module, prefix = model.get_submodule(node.target), node.target + "."
            own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
            return functional_call(module, own, args, kwargs) if own else module(*args, **kwargs)
    raise TraceError(f"cannot run the node {node.format_node()}")


def value_of(node: fx.Node, model: nn.Module, values: Values, parameters: dict[str, Tensor]) -> Any:
    """What a node has computed; of a parameter or buffer that is not among `values`, what it is in the model now.

    Nothing keeps a parameter's value: on a device it may be a copy from before its layer was solved.
    """
    if node in values or node.op != "get_attr":
        return values[node]
    return parameters[node.target] if node.target in parameters else fetch(model, node.target)


def fetch(model: nn.Module, path: str) -> Any:
    """The attribute of `model` at a dotted path."""
    for part in path.split("."):
        model = getattr(model, part)
    return model
