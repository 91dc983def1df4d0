"""How a GPU multiplies numbers of single precision."""

from __future__ import annotations

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
