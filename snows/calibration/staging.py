"""Copies between the host and a GPU, through one buffer of pinned memory while the GPU does other work.

A copy overlaps with computation only from pinned memory, of which torch's own allocator takes a power of two for each
tensor and keeps it. Here everything passes through one buffer, as large as the largest micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

ALIGNMENT = 64  # bytes, of each tensor among others in a buffer or a file


def extent(tensor: Tensor) -> int:
    """How many numbers lie between a tensor's first and its last in memory, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def laid_flat(tensor: Tensor) -> Tensor:
    """(extent,): the numbers of a tensor in the order in which they lie in memory, those in its gaps included."""
    return tensor.detach().as_strided((extent(tensor),), (1,))


def nbytes(values: Any) -> int:
    """Bytes of the tensors in a tree, with their gaps."""
    return sum(extent(leaf) * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def places(tensors: list[Tensor]) -> tuple[list[int], int]:
    """(the byte at which each tensor begins, the bytes in all) where they lie one after the other."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-extent(tensor) * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return starts, end


class Upload:
    """Values on their way to the device."""

    def __init__(self, values: Any, device: torch.device, arrived: torch.cuda.Event):
        self.values, self.device, self.arrived = values, device, arrived

    def result(self) -> Any:
        """The values on the device, for whatever is computed there from now on."""
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self.arrived)
        for leaf in tree_leaves(self.values):
            if isinstance(leaf, Tensor):
                leaf.record_stream(now)  # the copies' stream does not take its memory back before these have run
        return self.values


class Staging:
    """One pinned buffer, and a stream of the GPU for the copies in each direction.

    The host waits only for the buffer, where the copy before has not left it yet.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.busy: torch.cuda.Event | None = None  # over once the buffer may be written to again
        self.asked: torch.cuda.Event | None = None  # over once what was asked of the device at the last upload is done

    def upload(self, values: Any) -> Upload:
        """Begin to copy values of the host to the device, which lags by at most one upload's work."""
        if self.asked is not None:
            self.asked.synchronize()  # else uploads that were used would wait on the device, outside of every budget
        self.asked = torch.cuda.Event()
        self.asked.record(torch.cuda.current_stream(self.device))
        leaves, spec = tree_flatten(values)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        moved, arrived = [], torch.cuda.Event()
        with torch.cuda.stream(self.up):
            for tensor, staged in zip(tensors, self._parts(tensors)):
                staged.copy_(laid_flat(tensor))
                copy = torch.empty_like(staged, device=self.device, pin_memory=False)
                moved.append(copy.copy_(staged, non_blocking=True).as_strided(tensor.shape, tensor.stride()))
            arrived.record(self.up)
        self.busy, there = arrived, iter(moved)
        leaves = [next(there) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Upload(tree_unflatten(leaves, spec), self.device, arrived)

    def download(self, values: Any) -> Any:
        """Values of the device, copied to the host."""
        leaves, spec = tree_flatten(values)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        parts, done = self._parts(tensors), torch.cuda.Event()
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            for tensor, staged in zip(tensors, parts):
                staged.copy_(laid_flat(tensor), non_blocking=True)
                tensor.record_stream(self.down)
            done.record(self.down)
        done.synchronize()
        copies = iter([part.clone().as_strided(t.shape, t.stride()) for t, part in zip(tensors, parts)])
        return tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """For each tensor a part of the buffer, flat and of its type, that may be written to."""
        if self.busy is not None:
            self.busy.synchronize()
        starts, end = places(tensors)
        if end > len(self.buffer):
            self.buffer = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
        ends = [start + extent(tensor) * tensor.element_size() for start, tensor in zip(starts, tensors)]
        return [self.buffer[start:end].view(t.dtype) for start, end, t in zip(starts, ends, tensors)]
