"""The logits among what a forward pass returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx


def logits_of(output: Any) -> Any:
    """A tensor as it is; of what holds more, as transformers' networks return it, the entry or attribute `logits`."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output if isinstance(output, (Tensor, fx.Proxy)) else getattr(output, "logits", output)
