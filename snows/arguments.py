"""What `prune` is called with, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from snows.errors import TraceError, UsageError, first_line
from snows.masks.patterns import NM, Selection, Unstructured
from snows.masks.saliency import SALIENCIES
from snows.methods import METHODS, Method
from snows.network.layers import Network
from snows.options import Options


def check_arguments(model: Any, pattern: Any, options: Any, mask_alg: Any, algo: Any, layers: Any, device: Any) -> None:
    """Refuse arguments of `prune` that it cannot do anything with.

    Raises:
        UsageError: one of them is none of what it may be. TraceError: the model is no plain module.
    """
    check_device(device)
    if not isinstance(model, Network):
        check_model(model)
    if not isinstance(pattern, (Unstructured, NM, dict, Selection)):
        raise UsageError(
            f"the pattern must be snows.Unstructured(...), snows.NM(...), or masks, {{layer name: tensor}}, "
            f"not {pattern!r}."
        )
    if not isinstance(options, Options):
        raise UsageError(f"options must be snows.Options(...), not {type(options).__name__}.")
    for chosen, known in ((algo, METHODS), (mask_alg, SALIENCIES)):
        if not (isinstance(chosen, str) and chosen in known) and not (known is METHODS and isinstance(chosen, Method)):
            raise UsageError(f"algorithm '{chosen}' is not one of {', '.join(known)}.")
    if isinstance(pattern, dict) and mask_alg != "MP":
        raise UsageError(f"the masks are given: there is nothing for {mask_alg} to choose.")
    if not callable(layers):
        raise UsageError("layers must be a function that says of a layer's name whether to prune it.")


def check_device(device: torch.device | str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: torch does not know it or cannot use it.
    """
    try:
        torch.ones(1, device=device).item()  # the meta device makes tensors that hold nothing
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use device {device}: {first_line(error)}") from error


def check_model(model: Any) -> None:
    """Refuse what is wrapped, compiled, or has no numbers yet.

    Raises:
        UsageError: it is no module. TraceError: it is no plain one; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, not {type(model).__name__}.")
    wrapped = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
    inner = next((name for kind, name in wrapped.items() if isinstance(model, kind)), None)
    if hasattr(model, "_orig_mod"):  # torch.compile's
        inner = "_orig_mod"
    if inner is not None:
        raise TraceError(f"cannot trace {type(model).__name__}: pass model.{inner}, the network inside.")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TraceError(
                f"cannot trace {name} (DistributedDataParallel): put the network inside, its .module, there."
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("cannot trace a scripted or jit-traced model: pass the module that it was made from.")
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        raise UsageError("the model has parameters without numbers (lazy, or on the meta device): load its weights.")
