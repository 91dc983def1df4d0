"""A checksum of tensors, by which a run knows its weights, masks and images again."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def checksum(tensors: Iterable[Tensor], text: str = "") -> str:
    """A CRC-32 of a text and of the tensors' bytes, in order."""
    value = zlib.crc32(text.encode())
    for tensor in tensors:
        dense = tensor.detach().cpu().contiguous()
        # What holds one number counts as contiguous with any strides, which a view as bytes would trip over.
        flat = dense.as_strided((dense.numel(),), (1,))
        value = zlib.crc32(flat.view(torch.uint8).numpy(), value)
    return f"{value:08x}"
