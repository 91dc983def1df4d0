"""The network as a line of operations: its prunable layers, and streams of images along it.

After the trace the engine knows no architectures, only nodes in execution order. A `Layer` is a prunable weight and
the node that uses it; a `Stream` is the calibration set, advanced along the line node by node and held at a cut. The
part of the line from a layer to the K-th counted operation behind it is a `Window` (snows/window.py).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from snows.attention import is_output
from snows.errors import SnowsError, first_line
from snows.memory import is_gpu
from snows.trace import Values, call, trace

# The operations that the paper counts (DESIGN: convolution, linear, attention, activation, normalisation).
ACTIVATION_MODULES = tuple(getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention")
COUNTED_MODULES = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Bilinear),
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm2d, nn.LocalResponseNorm),
    *ACTIVATION_MODULES,
)
ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "sigmoid", "tanh"}
ACTIVATIONS |= {"hardswish", "hardsigmoid", "hardtanh", "softmax", "log_softmax", "softplus", "softsign", "logsigmoid"}
LINEAR_MAPS = {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "scaled_dot_product_attention"}
NORMS = {"layer_norm", "group_norm", "batch_norm", "rms_norm", "instance_norm", "local_response_norm"}
# Functions that hide linear maps: torchvision's Swin hands both projections of an attention to one.
HIDING = {"shifted_window_attention"}
COUNTED_FUNCTIONS = ACTIVATIONS | LINEAR_MAPS | NORMS | HIDING | {"multi_head_attention_forward"}


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

    `model` is a private copy in evaluation mode; its weights change as layers are solved. `calls` counts how often each
    module is called. `refused` maps the name of every Conv2d or Linear whose weight cannot be pruned to the reason.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        self.model = copied(model).to(device).eval().requires_grad_(False)
        self.in_place = [m for m in self.model.modules() if getattr(m, "inplace", False) is True]  # until the trace
        self.nodes = trace(self.model)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.input = self.nodes[0]
        self.output = self.nodes[-1].args[0]
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in self.nodes}
        self.calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        self.batch_norm_of = self._pair_batch_norms()
        self.layers, self.refused = self._find_layers()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, or None."""
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def is_counted(self, node: fx.Node) -> bool:
        """Whether the paper counts this node as an operation. A BatchNorm behind a convolution is part of it."""
        if node.op == "call_module":
            module = self.module(node)
            if isinstance(module, nn.MultiheadAttention):
                return False  # but its output is, the first of the pair that it returns
            if node in self.batch_norm_of.values():
                return not isinstance(getattr(module, "act", nn.Identity()), nn.Identity)
            return isinstance(module, COUNTED_MODULES) or any(True for _ in prunable_weights(module))
        if is_output(node):
            return isinstance(self.module(node.args[0]), nn.MultiheadAttention)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_function", "call_method") and name in COUNTED_FUNCTIONS

    def reads(self, node: fx.Node, parameter: str) -> bool:
        """Whether a node uses the parameter itself (a module may be called more than once)."""
        if node.op == "call_module":
            return parameter.startswith(node.target + ".")
        return node.op == "get_attr" and node.target == parameter

    def is_shared(self, parameter: str) -> bool:
        """Whether a parameter belongs to several modules (tied weights)."""
        return self.owners[id(self.model.get_parameter(parameter))] > 1

    def _pair_batch_norms(self) -> dict[fx.Node, fx.Node]:
        """Convolutions whose only user is a BatchNorm with fixed statistics.

        Not one that multiplies by zero, as residual branches are initialised: its output tells nothing of its input.
        Nor one behind a linear map, which takes tokens for channels where there are any.
        """
        pairs = {}
        for node in self.nodes:
            producer = node.args[0] if node.args else None
            if not isinstance(producer, fx.Node) or type(self.module(producer)) is not nn.Conv2d:
                continue
            once = self.calls[producer.target] == 1 and len(producer.users) == 1
            if once and is_fixed_batch_norm(self.module(node)) and not is_zero(self.module(node).weight):
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
                if self.is_shared(parameter):
                    refused[name] = "its weight is that of another layer too"
                    continue
                if not multiplies_by_weight(module):
                    refused[name] = "it does not multiply by its weight as it is (standardised, say)"
                    continue
                node = next((n for n in self.nodes if self.reads(n, parameter)), None)
                if node is not None and node.op == "get_attr":
                    weight, node = node, self._functional_user(node)
                    if node is None:
                        (user, *_) = (getattr(user.target, "__name__", user.target) for user in weight.users)
                        refused[name] = f"its weight goes into {user}, not straight into a linear map or convolution"
                        continue
                if node is None:
                    refused[name] = "the traced forward pass does not use it"
                elif isinstance(self.module(node), nn.MultiheadAttention):
                    refused[name] = "its attention takes masks or several inputs, or returns its weights"
                else:
                    weight = module._parameters[key]
                    groups = getattr(module, "groups", 1)
                    layers[name] = Layer(name, parameter, node, weight.shape, groups, self._bias_of(node))
        return sorted(layers.values(), key=lambda layer: self.position[layer.node]), refused

    def _bias_of(self, node: fx.Node) -> str | None:
        """The name of the bias that the output of a convolution or linear map alone is added to, or None."""
        if node.target is F.linear:
            bias = node.args[2] if len(node.args) > 2 else None
            name = bias.target if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
        elif type(self.module(node)) in (nn.Conv2d, nn.Linear):
            owner = self.batch_norm_of.get(node, node)
            elsewhere = owner is not node and self.calls[owner.target] > 1
            name = f"{owner.target}.bias" if self.module(owner).bias is not None and not elsewhere else None
        else:
            return None
        return None if name is None or self.is_shared(name) else name

    def _functional_user(self, weight: fx.Node) -> fx.Node | None:
        """The function that multiplies by this weight as it is, or None."""
        user = min(weight.users, key=self.position.get)
        direct = user.target in (F.conv2d, F.linear) and len(user.args) > 1 and user.args[1] is weight
        return user if direct or getattr(user.target, "__name__", "") in HIDING else None


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        SnowsError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a module's tensors raise
        raise SnowsError(
            f"the model cannot be copied: {first_line(error)} torch.nn.utils.prune and weight_norm leave weights that "
            f"cannot be: make them permanent first (prune.remove, remove_weight_norm)."
        ) from error


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


@torch.no_grad()
def multiplies_by_weight(module: nn.Module) -> bool:
    """Whether what a convolution or linear map computes is linear in its weight, so that zeros there are zeros.

    Asked of classes with a forward pass of their own, with noise for the input and for weights R and S: the output is
    another at S than at R, and its mean at R + S and R - S is that at R. Where they take no such input, it is taken so.
    """
    if isinstance(module, nn.MultiheadAttention) or type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
        return True
    shape, generator = (1, module.weight.shape[1]), torch.Generator().manual_seed(0)
    if isinstance(module, nn.Conv2d):
        shape = (1, module.in_channels, *(d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation)))
    shapes = (shape, module.weight.shape, module.weight.shape)
    x, r, s = (torch.randn(each, generator=generator).to(module.weight) for each in shapes)
    try:
        at_r, at_s, *around = (functional_call(module, {"weight": weight}, (x,)) for weight in (r, s, r + s, r - s))
    except (RuntimeError, TypeError, ValueError):
        return True
    return not torch.equal(at_r, at_s) and torch.allclose(
        sum(around), 2 * at_r, rtol=1e-3, atol=1e-3 * at_r.abs().max().item()
    )


def is_zero(weight: Tensor | None) -> bool:
    return weight is not None and not weight.any()


def is_fixed_batch_norm(module: nn.Module | None) -> bool:
    """A BatchNorm that normalises with running statistics: an affine map, x -> scale * x + shift."""
    return isinstance(module, _BatchNorm) and module.running_var is not None


def to(values: Any, device: torch.device | str) -> Any:
    """Every tensor inside `values` on `device`; copies to the host are pinned so that the way back can overlap."""

    def move(tensor: Tensor) -> Tensor:
        if torch.device(device).type == "cpu" and tensor.is_cuda:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        return tensor.to(device, non_blocking=True)

    return tree_map_only(Tensor, move, values)


def laid_out(images: Tensor, device: torch.device | str) -> Tensor:
    """Images with their channels last in memory on a CPU: convolutions keep that layout, and are faster in it."""
    return images if is_gpu(device) or images.ndim != 4 else images.to(memory_format=torch.channels_last)


class Stream:
    """The calibration set at one cut of the line: `values[i]` holds what micro-batch i still needs further on.

    `advance` runs each node once for the whole job. Values are kept on the host and moved to `device` per micro-batch,
    so that the device never holds more than one micro-batch of them.
    """

    def __init__(self, network: Network, model: nn.Module, batches: list[Tensor], device: torch.device | str):
        self.network, self.model, self.device = network, model, device
        self.sizes = [len(batch) for batch in batches]  # images in each micro-batch
        self.values: list[Values] = [{network.input: laid_out(batch, device)} for batch in batches]
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
                for read in step.all_input_nodes:
                    if self.network.last_use[read] <= self.network.position[step]:
                        del values[read]
            self.values[i] = to({n: v for n, v in values.items() if self.network.last_use[n] >= end}, "cpu")
        self.cut = end
