"""The network as a line of operations: its trace, its prunable layers, windows and streams.

A model is traced once with torch.fx. After that the engine knows no architectures, only nodes in execution order:

* a `Layer` is a prunable weight and the node that uses it;
* a `Window` is the part of the line from a layer to the K-th counted operation behind it (paper, section 3.1);
* a `Stream` is the calibration set, advanced along the line node by node and held at the current cut.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from snows.errors import TraceError

Values = dict[fx.Node, Any]  # what each node computed, for one micro-batch: tensors, but also plain integers

# The operations that the paper counts (DESIGN: convolution, linear, attention, activation, normalisation).
ACTIVATION_MODULES = tuple(getattr(activation, name) for name in activation.__all__)  # MultiheadAttention included
COUNTED_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear),
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d, nn.LocalResponseNorm),
    *ACTIVATION_MODULES,
)
ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "sigmoid", "tanh"}
ACTIVATIONS |= {"hardswish", "hardsigmoid", "hardtanh", "softmax", "log_softmax", "softplus", "softsign", "logsigmoid"}
LINEAR_MAPS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "scaled_dot_product_attention"}
NORMS = {"layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "local_response_norm"}
COUNTED_FUNCTIONS = ACTIVATIONS | LINEAR_MAPS | NORMS | {"multi_head_attention_forward"}

IN_PLACE_OPERATORS = {
    getattr(operator, "i" + name): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul")
}


@dataclass(frozen=True)
class Layer:
    """A prunable weight: the parameter `name` + ".weight", first used by `node`.

    shape is (out, in) for a linear map and (out, in / groups, kh, kw) for a convolution. `bias` is the parameter that
    can take up a shift of the output: the layer's own bias, or that of the BatchNorm behind it.
    """

    name: str
    parameter: str
    node: fx.Node
    shape: torch.Size
    groups: int = 1
    bias: str | None = None


class Network:
    """A traced model: `nodes` in execution order and the prunable `layers` among them.

    `model` is a private copy in evaluation mode; its weights change as layers are solved. `refused` maps the name of
    every Conv2d or Linear whose weight cannot be pruned to the reason.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.nodes = trace(self.model)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.input = self.nodes[0]
        self.output = self.nodes[-1].args[0]
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in self.nodes}
        self.batch_norm_of = self._pair_batch_norms()
        self.layers, self.refused = self._find_layers()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def is_counted(self, node: fx.Node) -> bool:
        """Whether the paper counts this node as an operation. A BatchNorm behind a convolution is part of it."""
        if node.op == "call_module":
            module = self.module(node)
            if node in self.batch_norm_of.values():
                return not isinstance(getattr(module, "act", nn.Identity()), nn.Identity)
            return isinstance(module, COUNTED_MODULES) or any(True for _ in prunable_weights(module))
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in COUNTED_FUNCTIONS

    def reads(self, node: fx.Node, parameter: str) -> bool:
        """Whether a node uses the parameter itself (a module may be called more than once)."""
        if node.op == "call_module":
            return parameter.startswith(node.target + ".")
        return node.op == "get_attr" and node.target == parameter

    def _pair_batch_norms(self) -> dict[fx.Node, fx.Node]:
        """Convolutions (and linear maps) whose only user is a BatchNorm with fixed statistics."""
        calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        pairs = {}
        for node in self.nodes:
            producer = node.args[0] if node.args else None
            if not isinstance(producer, fx.Node) or type(self.module(producer)) not in (nn.Conv2d, nn.Linear):
                continue
            once = calls[producer.target] == 1 and len(producer.users) == 1
            if once and is_fixed_batch_norm(self.module(node)):
                pairs[producer] = node
        return pairs

    def _find_layers(self) -> tuple[list[Layer], dict[str, str]]:
        """The prunable weights in execution order, and the reason for each Conv2d or Linear that is not among them."""
        layers, refused = {}, {}
        for path, module in self.model.named_modules():
            for key in prunable_parameters(module):
                parameter = f"{path}.{key}".lstrip(".")
                name = parameter.removesuffix(".weight").removesuffix("_weight")
                if key not in module._parameters:
                    refused[name] = "its weight is computed from other parameters"
                    continue
                node = next((n for n in self.nodes if self.reads(n, parameter)), None)
                if node is not None and node.op == "get_attr":
                    node = self._functional_user(node)
                    if node is None:
                        refused[name] = "its weight is transformed before use, so that zeros would not stay zero"
                        continue
                if node is None:
                    refused[name] = "the traced forward pass does not use it"
                else:
                    weight = module._parameters[key]
                    groups = getattr(module, "groups", 1)
                    layers[name] = Layer(name, parameter, node, weight.shape, groups, self._bias_of(node))
        return sorted(layers.values(), key=lambda layer: self.position[layer.node]), refused

    def _bias_of(self, node: fx.Node) -> str | None:
        """The name of the bias that the output of a convolution or linear map is added to, or None."""
        if type(self.module(node)) not in (nn.Conv2d, nn.Linear):
            return None
        owner = self.batch_norm_of.get(node, node)
        return f"{owner.target}.bias" if self.module(owner).bias is not None else None

    def _functional_user(self, weight: fx.Node) -> fx.Node | None:
        """The convolution or linear function that takes this weight as it is, or None."""
        user = min(weight.users, key=self.position.get, default=None)
        direct = user is not None and user.target in (F.conv2d, F.linear) and len(user.args) > 1
        return user if direct and user.args[1] is weight else None


def prunable_parameters(module: nn.Module) -> list[str]:
    """The names of the weights that a module itself owns and that may be pruned."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return ["in_proj_weight"]
    return []


def prunable_weights(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """(name inside `module`, parameter) of every prunable weight of a leaf of the trace."""
    for path, child in module.named_modules():
        for key in prunable_parameters(child):
            yield f"{path}.{key}".lstrip("."), getattr(child, key)


# ---------------------------------------------------------------------------------------------------------- tracing


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
    make_out_of_place(graph, model)
    nodes = list(graph.nodes)
    if not isinstance(nodes[-1].args[0], fx.Node):
        raise TraceError(f"cannot prune {type(model).__name__}: its forward() must return one tensor, the logits.")
    return nodes


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
        overwritten = node.args[0]
        for user in list(overwritten.users):
            if position[user] > position[node]:
                user.replace_input_with(overwritten, node)
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False


def is_in_place(name: str, namespace: Any) -> bool:
    """Whether `name` follows torch's naming of in-place operations and has an out-of-place twin in `namespace`."""
    return name.endswith("_") and not name.endswith("__") and hasattr(namespace, name[:-1])


# ---------------------------------------------------------------------------------------------------------- running


def is_fixed_batch_norm(module: nn.Module | None) -> bool:
    """A BatchNorm that normalises with running statistics: an affine map, x -> scale * x + shift."""
    return isinstance(module, _BatchNorm) and module.running_var is not None


def affine_of(batch_norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (channels,), of a BatchNorm with fixed statistics."""
    scale = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    if batch_norm.weight is not None:
        scale = scale * batch_norm.weight
    shift = -batch_norm.running_mean * scale
    return scale, shift if batch_norm.bias is None else shift + batch_norm.bias


def normalise(batch_norm: _BatchNorm, x: Tensor) -> Tensor:
    """The affine map of a BatchNorm with fixed statistics, applied to x (n, channels, ...)."""
    scale, shift = (vector.view(-1, *[1] * (x.ndim - 2)) for vector in affine_of(batch_norm))
    return torch.addcmul(shift, x, scale)


def call(node: fx.Node, model: nn.Module, values: Values, parameters: dict[str, Tensor]) -> Any:
    """Run one node on the values of its inputs; `parameters` overrides the model's, by full name."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    match node.op:
        case "get_attr":
            return parameters[node.target] if node.target in parameters else fetch(model, node.target)
        case "call_function":
            return node.target(*args, **kwargs)
        case "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        case "call_module":
            module, prefix = model.get_submodule(node.target), node.target + "."
            own = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
            return functional_call(module, own, args, kwargs) if own else module(*args, **kwargs)
    raise TraceError(f"cannot run the node {node.format_node()}")


def fetch(model: nn.Module, path: str) -> Any:
    """The attribute of `model` at a dotted path."""
    for part in path.split("."):
        model = getattr(model, part)
    return model


def to(values: Any, device: torch.device | str) -> Any:
    """Every tensor inside `values` on `device`; copies to the host are pinned so that the way back can overlap."""

    def move(tensor: Tensor) -> Tensor:
        if torch.device(device).type == "cpu" and tensor.is_cuda:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return tensor.to(device, non_blocking=True)

    return tree_map_only(Tensor, move, values)


# ---------------------------------------------------------------------------------------------------------- windows


class TwiceDifferentiable(TorchFunctionMode):
    """Replaces functions whose derivative torch cannot differentiate again by equal ones whose derivative it can."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.hardsigmoid, torch._C._nn.hardsigmoid):
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


class Window:
    """The sub-graph from a layer to the K-th counted operation after it (paper, equation 4: f_k(X; W), k = 0..K).

    It starts at the layer: nothing before it is recomputed. What the window needs that does not depend on the layer's
    weight (a shortcut branch, the other input of a concatenation) is computed once per micro-batch, by `enter`.
    Inside the window a BatchNorm is an affine map, folded into the convolution it follows, and attention uses the
    kernel that has second derivatives. `model` holds the weights of everything but the layer itself.
    """

    def __init__(self, network: Network, layer: Layer, k_step: int, model: nn.Module | None = None):
        self.network, self.layer, self.model = network, layer, network.model if model is None else model
        start = network.position[layer.node]
        behind = {n for n in network.nodes if network.reads(n, layer.parameter)}  # what depends on the weight
        counted = []
        for node in network.nodes[start:]:
            if node in behind or behind.intersection(node.all_input_nodes):
                behind.add(node)
                if node is layer.node or network.is_counted(node):
                    counted.append(node)
            if len(counted) > k_step:
                break
        self.features = counted  # K + 1 nodes, or fewer near the end of the line
        needed = set(counted)
        for node in reversed(network.nodes[start : network.position[counted[-1]] + 1]):
            if node in needed:
                needed.update(node.all_input_nodes)
        needed = [n for n in network.nodes if n in needed]
        self.nodes = [n for n in needed if n in behind]
        self.aside = [n for n in needed if n not in behind and network.position[n] > start]
        self.inputs = {n for node in self.nodes for n in node.all_input_nodes if n not in behind}
        self.folded = {n: network.batch_norm_of[n] for n in self.nodes if n in network.batch_norm_of}
        self.constants = self._fold_constants()

    def _fold_constants(self) -> dict[str, Tensor]:
        """Weights and biases of the window's convolutions, the BatchNorm behind each folded in."""
        constants = {}
        for conv, batch_norm in self.folded.items():
            module, (scale, shift) = self.module(conv), affine_of(self.module(batch_norm))
            constants[f"{conv.target}.weight"] = module.weight * scale.view(-1, *[1] * (module.weight.ndim - 1))
            constants[f"{conv.target}.bias"] = shift if module.bias is None else shift + scale * module.bias
        return constants

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None, with the window's weights."""
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def enter(self, values: Values) -> Values:
        """What the window reads, from the values at the cut."""
        values = dict(values)
        with torch.no_grad():
            for node in self.aside:
                if node not in values:
                    values[node] = call(node, self.model, values, {})
        return {node: values[node] for node in self.inputs}

    def __call__(self, values: Values, weight: Tensor, shift: Tensor | None = None) -> list[Tensor]:
        """Features f_0 .. f_K at `weight`, one tensor (n, ...) for each counted operation.

        shift: (out,), added to the layer's own output (before any BatchNorm), besides its bias.
        """
        parameters = {**self.constants, self.layer.parameter: weight}
        scale = self.output_scale()
        if scale is not None:
            parameters[self.layer.parameter] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        if shift is not None:
            name = f"{self.layer.node.target}.bias"
            bias = self.constants[name] if scale is not None else self.module(self.layer.node).bias
            parameters[name] = bias + (shift if scale is None else scale * shift)
        return self._run(self.nodes, dict(values), parameters)

    def output_scale(self) -> Tensor | None:
        """The factor (out,) by which the BatchNorm behind the layer scales its output; None without one."""
        batch_norm = self.folded.get(self.layer.node)
        return None if batch_norm is None else affine_of(self.module(batch_norm))[0]

    def output(self, values: Values, weight: Tensor) -> Tensor:
        """The layer's own output at `weight`, (n, out, ...), before any BatchNorm."""
        return call(self.layer.node, self.model, values, {self.layer.parameter: weight})

    def behind(self, values: Values, output: Tensor) -> list[Tensor]:
        """The features as a function of the layer's own output: the map that a preconditioner pulls back."""
        if self.layer.node in self.folded:
            output = normalise(self.module(self.folded[self.layer.node]), output)
        later = [n for n in self.nodes if self.network.position[n] > self.network.position[self.layer.node]]
        return self._run(later, {**values, self.layer.node: output}, self.constants)

    def _run(self, nodes: list[fx.Node], values: Values, parameters: dict[str, Tensor]) -> list[Tensor]:
        already_applied = set(self.folded.values())
        with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            for node in nodes:
                module = self.module(node)
                if is_fixed_batch_norm(module):
                    x = values[node.args[0]]
                    x = x if node in already_applied else normalise(module, x)
                    values[node] = module.act(module.drop(x)) if hasattr(module, "act") else x
                else:
                    values[node] = call(node, self.model, values, parameters)
        return [values[node] for node in self.features]


# ---------------------------------------------------------------------------------------------------------- streams


class Stream:
    """The calibration set at one cut of the line: `values[i]` holds what micro-batch i still needs further on.

    `advance` runs each node once for the whole job. Values are kept on the host and moved to `device` per micro-batch,
    so that the device never holds more than one micro-batch of them.
    """

    def __init__(self, network: Network, model: nn.Module, batches: list[Tensor], device: torch.device | str):
        self.network, self.model, self.device = network, model, device
        self.values: list[Values] = [{network.input: batch} for batch in batches]
        self.cut = 1  # the position of the first node that has not run

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Values:
        return to(self.values[index], self.device)

    @torch.no_grad()
    def advance(self, node: fx.Node) -> None:
        """Run every node before `node`, and forget what no later node reads."""
        end = self.network.position[node]
        steps = self.network.nodes[self.cut : end]
        if not steps:
            return
        for i in range(len(self)):
            values = self[i]
            for step in steps:
                values[step] = call(step, self.model, values, {})
            self.values[i] = to({n: v for n, v in values.items() if self.network.last_use[n] >= end}, "cpu")
        self.cut = end
