"""torch's modes: those that a caller may be in, switched off; how precisely a GPU multiplies, and to the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

PRECISIONS = {"tf32": "tf32", "highest": "ieee"}  # the option's name -> torch's
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


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Let convolutions and matrix products on a GPU round their factors to TF32's 10 bits, or keep all 23.

    Has no bearing on a CPU, nor on numbers of double precision.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = PRECISIONS[name]
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


def make_deterministic() -> None:
    """Let torch choose algorithms that give the same bits every time, or refuse where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
