"""How a GPU computes: how precisely it multiplies, and whether to the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {"tf32": "tf32", "highest": "ieee"}  # the option's name -> torch's


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
