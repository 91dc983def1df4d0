"""torch's modes that a caller may be in, set aside: what is computed does not depend on where it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu")  # the kinds of device that may have it


@contextmanager
def own_modes() -> Iterator[None]:
    """Neither inference mode nor autocast, whose numbers cannot be solved with; derivatives are to be had."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
