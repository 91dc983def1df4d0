"""2:4 products on an NVIDIA GPU: a network whose 2:4 layers are packed for torch's semi-structured kernels.

torch's own conversion packs whatever it is given. A weight that is not 2:4 loses the weights that do not fit, in
silence, float32 is packed 1:2, torch's attention cannot take a packed weight, and packed tensors cannot be saved. Here
a layer is packed if nothing is lost by it; all others stay dense, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from snows.deploy.opened import as_module, mapped_layers
from snows.errors import SnowsError, UsageError, by_reason
from snows.masks.patterns import NM
from snows.network.concrete import Example
from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.operations import LinearMap

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64  # a weight's sides are multiples of these: CUTLASS's, of which cuSPARSELt's are divisors
CAPABILITY = (8, 0)  # the first GPUs that multiply 2:4


@dataclass
class Converted:
    """A network that multiplies 2:4: for inference, and not to be saved.

    model: a module of the network's operations, torch's attention opened. packed: the layers that are 2:4 on the GPU.
    left_dense: layer name -> reason.
    """

    model: nn.Module
    packed: list[str] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)


def convert(model: nn.Module, dtype: torch.dtype = torch.float16, example: Example = None) -> Converted:
    """A copy of a network in evaluation mode, in `dtype`, its 2:4 linear layers packed; the network lies on a GPU.

    example: images, or the shape of one, for networks that cannot be traced without.

    Raises:
        UsageError: another dtype, a device without such kernels, or no layer that is 2:4.
        TraceError: the forward pass cannot be traced.
    """
    if dtype not in DTYPES:
        raise UsageError(f"2:4 kernels take float16 or bfloat16, not {dtype}: torch packs float32 1:2.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    check_gpu(device)
    network = Network(model, device, example)
    network.model.to(dtype)
    converted = Converted(network.model, left_dense=dict(network.refused))
    found = {layer.name: (layer, mapped) for layer, mapped in mapped_layers(network)}
    for layer in network.layers:
        reason = (
            why_dense(network, *found[layer.name])
            if layer.name in found
            else "what uses its weight is no single linear map"
        )
        if reason is None:
            pack_layer(network, layer)
            converted.packed.append(layer.name)
        else:
            converted.left_dense[layer.name] = reason
    if not converted.packed:
        raise UsageError(f"no layer can be packed 2:4: {by_reason(converted.left_dense)}.")
    converted.model = as_module(network, {}).eval()
    converted.model.register_state_dict_pre_hook(refuse_to_save)
    return converted


def check_gpu(device: torch.device) -> None:
    """Raises: UsageError: the device has no 2:4 kernels."""
    if device.type != "cuda":
        raise UsageError(f"2:4 kernels run on NVIDIA GPUs; the network is on {device}: move it there first.")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise UsageError("this GPU has compute capability {}.{}; 2:4 kernels need 8.0 or more.".format(*capability))


def why_dense(network: Network, layer: Layer, mapped: LinearMap) -> str | None:
    """Why a layer's weight cannot be packed without loss, or None."""
    weight = network.model.get_parameter(layer.parameter)
    if mapped.convolution is not None:
        return "a convolution: the kernels multiply matrices alone"
    if not weight.isfinite().all():
        return f"it has numbers beyond {weight.dtype}"
    if not NM(2, 4).holds(weight != 0):
        return "it is not 2:4 along its inputs"
    rows, columns = weight.shape
    if rows % ROWS or columns % COLUMNS:
        return f"its {rows} x {columns} are no multiples of {ROWS} x {COLUMNS}"
    return None


def pack_layer(network: Network, layer: Layer) -> None:
    """Put a packed weight in a layer's place, whose input it needs to be contiguous."""
    owner, _, key = layer.parameter.rpartition(".")
    weight = network.model.get_parameter(layer.parameter).detach().contiguous()
    packed = nn.Parameter(pack(weight), requires_grad=False)
    setattr(network.model.get_submodule(owner), key, packed)
    node: fx.Node = layer.node
    with node.graph.inserting_before(node):
        contiguous = node.graph.call_method("contiguous", node.args[:1])
    node.args = (contiguous, *node.args[1:])


def pack(weight: Tensor) -> Tensor:
    """A 2:4 weight as the GPU's kernels take it."""
    return torch.sparse.to_sparse_semi_structured(weight)


def refuse_to_save(*arguments: Any) -> None:
    raise SnowsError("packed 2:4 weights cannot be saved: save the network itself, and convert it when it is loaded.")
