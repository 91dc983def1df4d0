"""The network as a line of operations, and its prunable layers.

After the trace the engine knows no architectures, only nodes in execution order. A `Layer` is a prunable weight and
the node that uses it. The calibration set on its way through the network is a `Stream` (snows/calibration/stream.py);
the part from a layer to the K-th counted operation after it is a `Window` (snows/network/window.py).
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snows.errors import SnowsError, first_line
from snows.network.attention import is_output
from snows.network.checks import check_device, check_model
from snows.network.concrete import Example, trace_somehow
from snows.network.known import (
    ACTIVATION_MODULES,
    ACTIVATIONS,
    cached_tensors,
    has_activation,
    is_zero,
    layer_name,
    multiplies_by_weight,
    prunable_parameters,
    prunable_weights,
)
from snows.network.operations import LinearMap, attribute, called, is_fixed_norm, linear_map, norm_bias, norm_of

Masks = dict[str, Tensor]  # layer name -> boolean mask of the weight's shape, True where the weight survives

# The operations that the paper counts (DESIGN: convolution, linear, attention, activation, normalisation).
COUNTED_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear),
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d, nn.LocalResponseNorm),
    *ACTIVATION_MODULES,
)
LINEAR_MAPS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "scaled_dot_product_attention"}
NORMS = {"layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "local_response_norm"}
# Functions that hide linear maps: torchvision's Swin hands both projections of an attention to one.
HIDING = {"shifted_window_attention"}
COUNTED_FUNCTIONS = ACTIVATIONS | LINEAR_MAPS | NORMS | HIDING | {"multi_head_attention_forward"}


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


class Network:
    """A traced model: `nodes` in execution order and the prunable `layers` among them.

    `original` is the caller's model, which must not change meanwhile, `model` a private copy in evaluation mode, whose
    weights change as layers are solved; `in_place` names its modules that wrote in place, `calls` counts each module's
    calls. `linear_maps` and `affine`: the linear maps on parameters, and the BatchNorms with fixed statistics, modules
    or functions. `refused`: each Conv2d or Linear whose weight cannot be pruned, and why. `idle`: the parameters that
    no node reads. `checked`: the windows and images on which the trace has been compared (calibration/faithful.py).
    `example`: images, the shape of one, or what gives images, for models that cannot be traced without.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu", example: Example = None):
        check_device(device)
        check_model(model)
        self.original, self.device = model, device
        self.model = copied(model, device).eval().requires_grad_(False)
        for module in self.model.modules():
            module._backward_hooks.clear()  # these and the next belong to training
            module._backward_pre_hooks.clear()
            if isinstance(module, nn.DataParallel):
                module.device_ids = []  # it calls the network inside, wherever that is
        self.in_place = [n for n, m in self.model.named_modules() if getattr(m, "inplace", False) is True]
        self.nodes = trace_somehow(self.model, example)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.input = self.nodes[0]
        self.output = self.nodes[-1].args[0]
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in self.nodes}
        self.by_target: dict[str, list[fx.Node]] = {}  # what calls a module, or reads a parameter
        for node in self.nodes:
            if node.op in ("call_module", "get_attr"):
                self.by_target.setdefault(node.target, []).append(node)
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.owners = owners_of(self.model)
        self.checked: Any = None
        self.pairs: set[fx.Node] = set()  # what returns several values, known once images have passed
        maps = {node: linear_map(node, self.model) for node in self.nodes}
        self.linear_maps: dict[fx.Node, LinearMap] = {node: each for node, each in maps.items() if each is not None}
        self.affine = {node for node in self.nodes if is_fixed_norm(node, self.model)}
        self.batch_norm_of = self._pair_batch_norms()
        self.layers, self.refused = self._find_layers()
        self.idle, self.told = self._unread_parameters(), False

    def copy(self) -> Network:
        """Another network of the same trace, whose weights change on their own."""
        twin = copy.copy(self)
        twin.model = copied(self.model)
        twin.owners = owners_of(twin.model)
        twin.affine, twin.pairs, twin.refused = set(self.affine), set(self.pairs), dict(self.refused)
        return twin

    def call_as_it_is(self, nodes: Iterable[fx.Node]) -> None:
        """Take these BatchNorms for no affine maps, nor fold them."""
        self.affine -= set(nodes)
        self.batch_norm_of = self._pair_batch_norms()
        refused = self.refused
        self.layers, self.refused = self._find_layers()
        for name in refused.keys() - self.refused.keys():
            self.refuse(name, refused[name])

    def refuse(self, name: str, reason: str) -> None:
        """Leave a layer dense."""
        self.layers = [layer for layer in self.layers if layer.name != name]
        self.refused[name] = reason

    def masked(self, layer: Layer, mask: Tensor) -> Tensor:
        """A layer's weight where its mask keeps it, else zero, even where it was NaN."""
        return self.model.get_parameter(layer.parameter).where(mask, 0)

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

    def _unread_parameters(self) -> list[str]:
        """The parameters that the forward pass does not use: an auxiliary head's, say."""
        read = set()
        for target in self.by_target:
            held = attribute(self.model, target)
            read |= {id(each) for each in (held.parameters() if isinstance(held, nn.Module) else [held])}
        return [name for name, parameter in self.model.named_parameters() if id(parameter) not in read]

    def outside(self) -> list[str]:
        """The weights that the forward pass uses and that are no layer's, nor refused as one: an LSTM's, say."""
        layers = {layer.parameter for layer in self.layers} | self._weights().keys()
        others = (name for name, each in self.model.named_parameters() if each.ndim > 1 and name not in layers)
        return [name for name in others if name not in self.idle]

    def is_shared(self, parameter: str) -> bool:
        """Whether a parameter belongs to several modules (tied weights)."""
        return self.owners[id(self.model.get_parameter(parameter))] > 1

    def _pair_batch_norms(self) -> dict[fx.Node, fx.Node]:
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

    def _find_layers(self) -> tuple[list[Layer], dict[str, str]]:
        """The prunable weights in execution order, and the reason for each Conv2d or Linear that is not among them."""
        layers, refused = {}, {}
        for parameter, module in self._weights().items():
            name = layer_name(parameter)
            reason = self._refusal(parameter, module)
            if reason is not None:
                refused[name] = reason
                continue
            node = self.users(parameter)[0]
            mapped, shape = self.linear_maps.get(node), self.model.get_parameter(parameter).shape
            groups = getattr((mapped and mapped.convolution) or module, "groups", 1)
            layers[name] = Layer(name, parameter, node, shape, groups, self._bias_of(node, parameter))
        return sorted(layers.values(), key=lambda layer: self.position[layer.node]), refused

    def _weights(self) -> dict[str, nn.Module]:
        """What may be a layer's weight, and the module that owns it: by the module's kind, or as a function uses it."""
        weights = {
            f"{path}.{key}".lstrip("."): module
            for path, module in self.model.named_modules()
            for key in prunable_parameters(module)
        }
        for node in self.nodes:
            mapped = self.linear_maps.get(node)
            if mapped is not None and isinstance(attribute(self.model, mapped.weight), nn.Parameter):
                weights.setdefault(mapped.weight, self.model.get_submodule(mapped.weight.rpartition(".")[0]))
        return weights

    def _refusal(self, parameter: str, module: nn.Module) -> str | None:
        """Why a weight cannot be pruned, or None."""
        if parameter.rpartition(".")[2] not in module._parameters:
            return "its weight is computed from other parameters"
        if self.is_shared(parameter):
            return "its weight is that of another layer too"
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not multiplies_by_weight(module):
            return "it does not multiply by its weight as it is (standardised, say)"
        node = next(iter(self.users(parameter)), None)
        if node is None:
            return "the traced forward pass does not use it"
        if not self._multiplies(node, parameter):
            user = getattr(node.target, "__name__", node.target)
            return f"its weight goes into {user}, not straight into a linear map or convolution"
        if isinstance(self.module(node), nn.MultiheadAttention):
            return "its attention takes masks or several inputs, or returns its weights"
        return None

    def _bias_of(self, node: fx.Node, weight: str) -> str | None:
        """The name of the bias that the output of a convolution or linear map alone is added to, or None.

        It is a parameter that nothing reads but what reads the weight, or but the BatchNorm that it belongs to.
        """
        mapped, batch_norm = self.linear_maps.get(node), self.batch_norm_of.get(node)
        if mapped is None:
            return None
        name = mapped.bias if batch_norm is None else norm_bias(batch_norm)
        if name is None or not isinstance(attribute(self.model, name), nn.Parameter) or self.is_shared(name):
            return None
        readers = self.users(weight) if batch_norm is None else [batch_norm]
        return name if set(self.users(name)) <= set(readers) else None

    def _multiplies(self, node: fx.Node, weight: str) -> bool:
        """Whether a node that uses a weight is a module that owns it, or a function that multiplies by it as it is."""
        if self.reads(node, weight) or getattr(node.target, "__name__", "") in HIDING:
            return True
        return node.target in (F.conv2d, F.linear) and len(node.args) > 1 and self.reads(node.args[1], weight)


def owners_of(model: nn.Module) -> Counter:
    """How many modules own each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)


def copied(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """A deep copy of a model, on a device; tied parameters stay tied, which not every device's `to` sees to.

    Raises:
        SnowsError: it cannot be copied.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    try:
        model = copy.deepcopy(model, {id(cached): cached.detach().clone() for cached in cached_tensors(model)})
    except Exception as error:  # whatever a module's tensors raise
        raise SnowsError(
            f"the model cannot be copied: {first_line(error)} torch.nn.utils.prune and weight_norm leave weights that "
            f"cannot be: make them permanent first (prune.remove, remove_weight_norm)."
        ) from error
    model = model if device is None else model.to(device)
    for first, *others in names.values():
        for owner, _, own in (name.rpartition(".") for name in others):
            setattr(model.get_submodule(owner), own, model.get_parameter(first))
    return model
