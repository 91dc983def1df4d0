"""A model as a list of operations: its trace, free of in-place writes, and how to run one of its nodes."""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.func import functional_call

from snows.attention import open_attention
from snows.errors import TraceError

Values = dict[fx.Node, Any]  # what each node computed, for one micro-batch: tensors, but also plain integers

IN_PLACE_OPERATORS = {
    getattr(operator, "i" + name): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
}
# What functions read, in order.
INPUTS = dict.fromkeys((F.linear, F.conv2d), ("input", "weight", "bias"))
INPUTS |= {F.scaled_dot_product_attention: ("query", "key", "value"), F.hardsigmoid: ("input",)}
ANY_LAYOUT = {"view": "reshape", "view_as": "reshape_as"}  # the same shapes, of values in any order in memory


class _Tracer(fx.Tracer):
    """fx's tracer, with the leaves that timm and torchvision ask for, and a memory of where it failed."""

    def __init__(self):
        wrapped = tuple(get_notrace_functions())
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=wrapped)
        self.leaves = tuple(get_notrace_modules())
        self.failed_in: str | None = None

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, name)

    def call_module(self, module, forward, args, kwargs):
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            # The innermost module sees the exception first and is the one to name.
            self.failed_in = self.failed_in or f"{self.path_of_module(module)} ({type(module).__name__})"
            raise


def trace(model: nn.Module) -> list[fx.Node]:
    """The operations of `model`, a module in evaluation mode, in execution order and free of in-place writes.

    Raises:
        TraceError: the forward pass cannot be traced, or takes or returns more than one tensor.
    """
    tracer = _Tracer()
    # Optional inputs of forward() (attention masks, ...) keep their defaults, as in model(images).
    _, *others = inspect.signature(model.forward).parameters.values()
    others = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.default is p.empty for p in others):
        raise TraceError(f"cannot trace {type(model).__name__}: its forward() needs more than the images.")
    try:
        graph = tracer.trace(model, concrete_args={p.name: p.default for p in others})
    except Exception as error:
        place = tracer.failed_in or f"the model itself ({type(model).__name__})"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"cannot trace {place}: {reason}. SNOWS needs a forward pass without data-dependent control flow; "
            f"wrap that part with torch.fx.wrap or register it with timm.models.register_notrace_module."
        ) from error
    _, *placeholders = (node for node in graph.nodes if node.op == "placeholder")
    defaults = set(placeholders)
    for node in graph.nodes:  # the tracer asserts that the defaults were passed: nothing else reads them
        defaults.update([node] if defaults.intersection(node.all_input_nodes) else [])
    for node in reversed(list(graph.nodes)):
        if node in defaults:
            graph.erase_node(node)
    make_positional(graph, model)
    open_attention(graph, model)
    make_out_of_place(graph, model)
    nodes = list(graph.nodes)
    if not isinstance(nodes[-1].args[0], fx.Node):
        raise TraceError(f"cannot prune {type(model).__name__}: its forward() must return one tensor, the logits.")
    return nodes


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
    """Replace every in-place operation, so that a value of the line never changes once it is computed.

    Without this a feature (a BatchNorm's output, say) is overwritten by the in-place ReLU behind it. Whoever reads the
    overwritten value later must read the result of the operation instead, which is what it would have seen.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if module is not None and getattr(module, "inplace", False) is True:
            pass  # the module itself is switched below
        elif node.op == "call_function" and node.target in IN_PLACE_OPERATORS:
            node.target = IN_PLACE_OPERATORS[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace", False) is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_function" and is_in_place(getattr(node.target, "__name__", ""), torch):
            node.target = getattr(torch, node.target.__name__[:-1])
        elif node.op == "call_method" and is_in_place(node.target, Tensor):
            node.target = node.target[:-1]
        else:
            continue
        overwritten = node.all_input_nodes[0]
        for user in list(overwritten.users):
            if position[user] > position[node]:
                user.replace_input_with(overwritten, node)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def is_in_place(name: str, namespace: Any) -> bool:
    """Whether `name` follows torch's naming of in-place operations and has an out-of-place twin in `namespace`."""
    return name.endswith("_") and not name.endswith("__") and hasattr(namespace, name[:-1])


def call(node: fx.Node, model: nn.Module, values: Values, parameters: dict[str, Tensor]) -> Any:
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
