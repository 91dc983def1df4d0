"""What cannot be traced or computed with: devices that are not there, models that are wrapped or have no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from snows.errors import TraceError, UsageError, first_line

LAYERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}  # as torch.export writes them


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
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"cannot trace {name or 'the model'}, a module that torch.jit compiled: pass the one it was made from."
            )
        if isinstance(module, fx.GraphModule) and any(node.target in LAYERS for node in module.graph.nodes):
            raise TraceError(
                f"cannot trace {name or 'the model'}, a program of torch.export: pass the network it was made from."
            )
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        raise UsageError("the model has parameters without numbers (lazy, or on the meta device): load its weights.")
