"""What modules are known to compute. A class says little: a subclass, a hook, a forward() of one's own change it.

Only what is known by its forward function, with nothing that steps in, is replaced by something equal and cheaper (a
BatchNorm folded into the convolution before it, an activation by its slope). All else is called as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch.func import functional_call
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

ACTIVATION_MODULES = tuple(getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention")
MIXING = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU)  # activations that are not elementwise
ELEMENTWISE_MODULES = {*ACTIVATION_MODULES} - {*MIXING}
ACTIVATIONS = {"relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "prelu", "sigmoid", "tanh"}
ACTIVATIONS |= {"hardswish", "hardsigmoid", "hardtanh", "softmax", "log_softmax", "softplus", "softsign", "logsigmoid"}
ELEMENTWISE = ACTIVATIONS - {"softmax", "log_softmax", "prelu"}
NAMESPACES = (torch, torch._C._nn, F)
ELEMENTWISE_FUNCTIONS = {getattr(space, name) for space in NAMESPACES for name in ELEMENTWISE if hasattr(space, name)}
# With running statistics, and followed by its own `drop` and `act`.
BATCH_NORMS = {_BatchNorm.forward, nn.SyncBatchNorm.forward}
BATCH_NORMS_WITH_ACTIVATION = {BatchNormAct2d.forward, SyncBatchNormAct.forward}
EVERY_MODULES = frozenset(vars(nn.Module()))  # attributes: parameters, buffers, modules, hooks


def is_watched(module: nn.Module) -> bool:
    """Whether something steps in when a module is called: hooks, which may do anything, or a forward() of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__


def is_plain(module: nn.Module | None, kinds: Iterable[type]) -> bool:
    """Whether a module is of one of these very classes, and nothing steps in."""
    return type(module) in kinds and not is_watched(module)


def is_fixed_batch_norm(module: nn.Module | None) -> bool:
    """A BatchNorm that normalises with running statistics: an affine map, x -> scale * x + shift, and an activation."""
    if not isinstance(module, _BatchNorm) or module.running_var is None or module.training or is_watched(module):
        return False
    return type(module).forward in BATCH_NORMS | BATCH_NORMS_WITH_ACTIVATION


def has_activation(batch_norm: Any) -> bool:
    """Whether a BatchNorm of a known kind calls its `drop` and `act` on what it has normalised."""
    return getattr(type(batch_norm), "forward", None) in BATCH_NORMS_WITH_ACTIVATION


def acts_elementwise(batch_norm: Any) -> bool:
    """Whether what a BatchNorm of a known kind does is, after its affine map, done to every number alone."""
    parts = [getattr(batch_norm, name, nn.Identity()) for name in ("drop", "act")] if has_activation(batch_norm) else []
    return all(is_plain(part, {*ELEMENTWISE_MODULES, nn.Identity, nn.Dropout}) for part in parts)


def prunable_parameters(module: nn.Module) -> list[str]:
    """The names of the weights that a module itself owns and that may be pruned."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return ["in_proj_weight"]
    return []


def layer_name(parameter: str) -> str:
    """What the layer of a weight is called in masks and records."""
    return parameter.removesuffix(".weight").removesuffix("_weight")


def weight_name(layer: str, state: Container[str]) -> str:
    """What the weight of a layer is called: NAME.weight, NAME_weight (of torchvision's attention), or NAME itself."""
    return next(name for name in (f"{layer}.weight", f"{layer}_weight", layer) if name in state)


def prunable_weights(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """(name inside `module`, parameter) of every prunable weight of a leaf of the trace."""
    for path, child in module.named_modules():
        for key in prunable_parameters(child):
            yield f"{path}.{key}".lstrip("."), getattr(child, key)


@torch.no_grad()
def multiplies_by_weight(module: nn.Module) -> bool:
    """Whether what a convolution or linear map computes is linear in its weight, so that zeros there are zeros.

    Asked of subclasses and where hooks stand in front, with noise for the input and for weights R and S: the output is
    another at S than at R, and its mean at R + S and R - S is that at R. Where they take no such input, it is taken so.
    """
    if isinstance(module, nn.MultiheadAttention) or is_plain(module, (nn.Conv2d, nn.Linear)):
        return True
    shape, generator = (1, module.weight.shape[1]), torch.Generator().manual_seed(0)
    if isinstance(module, nn.Conv2d):
        shape = (1, module.in_channels, *(d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation)))
    shapes = (shape, module.weight.shape, module.weight.shape)
    x, r, s = (torch.randn(each, generator=generator, device="cpu").to(module.weight) for each in shapes)
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()  # after the product: whatever they do
    try:
        at_r, at_s, *around = (functional_call(module, {"weight": weight}, (x,)) for weight in (r, s, r + s, r - s))
    except Exception:  # whatever a forward pass raises of an input that is not its own
        return True
    finally:
        module._forward_hooks = hooks
    return not torch.equal(at_r, at_s) and torch.allclose(
        sum(around), 2 * at_r, rtol=1e-3, atol=1e-3 * at_r.abs().max().item()
    )


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without those that every module has."""
    return {name: value for name, value in vars(module).items() if name not in EVERY_MODULES}


def cached_tensors(model: nn.Module) -> list[torch.Tensor]:
    """What modules keep of what they have computed, with its graph: no parameter, nor what a hook computes of some."""
    kept = []
    for module in model.modules():
        own = attributes(module).values()
        plain = not module._forward_pre_hooks  # as weight_norm and torch.nn.utils.prune have, of whose weights one is
        kept += [value for value in own if plain or isinstance(value, (dict, list, tuple))]
    held = [leaf for value in kept for leaf in tree_leaves(value)]
    return [leaf for leaf in held if isinstance(leaf, torch.Tensor) and not leaf.is_leaf]


def is_zero(weight: torch.Tensor | None) -> bool:
    return weight is not None and not weight.any()
