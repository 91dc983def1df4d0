"""What a job may use of the memory, and for what: micro-batches, inverses, recycled products, streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snows.memory import GIB, free_memory, is_gpu, used_memory
from snows.options import Options

# Bytes at the most.
MICRO_BATCH = 2**30  # that a micro-batch may need on the host, if there is four times as much
GPU_MICRO_BATCH = 2**33  # and on a device of its own
LAYER_INVERSES = 2**29  # of all the inverses of a layer; beyond it each row's support is cut into smaller blocks
ALL_INVERSES = 2**30  # of the inverses of all layers together, in the joint steps; and of the moments they come from
RECYCLED = 2**31  # of the products that the next Newton step is preconditioned with


@dataclass(frozen=True)
class Budget:
    """Bytes that a job may use, besides what is in use when it begins.

    device: where it computes. host: for what the device has no room for; the same where the device is the host.
    asked: whether the caller set them, or they are what is free.
    """

    device: int
    host: int
    vectors: int = 0
    asked: bool = False
    apart: bool = False  # the device is not the host
    processes: int = 1  # that share a micro-batch

    @classmethod
    def of(cls, options: Options, device: torch.device | str, vectors: int = 0, neighbours: int = 1) -> Budget:
        """What `memory_budget` leaves besides the networks and images that are in memory already, or what is free.

        vectors: bytes that the solver's vectors take at the most.
        neighbours: the processes that share the host, each of which has a device of its own where that is not the host.
        """
        asked, places = int(options.memory_budget * GIB), (device, "cpu")
        free = [free_memory(place) // (1 if is_gpu(place) else neighbours) for place in places]
        if asked:
            free = [min(left, asked - used_memory(place)) for left, place in zip(free, places)]
        on_device, on_host = (max(0, left) for left in free)
        return cls(on_device, on_host, vectors, bool(asked), torch.device(device).type != "cpu")

    @property
    def micro_batch(self) -> int:
        """Bytes for the linearisation of one micro-batch, with what comes and goes meanwhile."""
        return min(GPU_MICRO_BATCH if self.apart else MICRO_BATCH, self.device // 4)

    @property
    def shared_micro_batch(self) -> int:
        """Bytes for a micro-batch of all the processes together.

        On the host they are as many for any number of processes, which so does not change the micro-batches; a device
        of one's own is busy with large shares only.
        """
        return self.micro_batch * (self.processes if self.apart else 1)

    def kept(self, vectors: int) -> int:
        """Bytes for what products need not compute again, besides the solver's vectors of the work at hand."""
        others = vectors + self.micro_batch + self.all_inverses + self.recycled_bytes + self.features("device")
        return max(0, self.device - others)

    @property
    def layer_inverses(self) -> int:
        """Bytes for the inverses of one layer's preconditioner."""
        return min(LAYER_INVERSES, self.device // 4)

    @property
    def all_inverses(self) -> int:
        """Bytes for the inverses of all the layers together."""
        return min(ALL_INVERSES, self.device // 4)

    @property
    def recycled_bytes(self) -> int:
        """Bytes for the products of earlier Newton steps."""
        others = self.vectors + self.micro_batch + self.all_inverses
        return min(RECYCLED, max(0, self.device - others) // 4)

    def recycled(self, wanted: int, vector: int) -> int:
        """How many products may be kept, if a vector has so many bytes: each a pair, known or of the step at hand."""
        return min(wanted, self.recycled_bytes // (4 * vector))

    @property
    def room(self) -> int:
        """Bytes for streams and targets outside of files."""
        return self.features("host") + (self.features("device") if self.apart else 0)

    def features(self, place: str) -> int:
        """Bytes for streams and targets on the device or on the host."""
        return self._half(self.device if place == "device" or not self.apart else self.host)

    def _half(self, total: int) -> int:
        """Half of what is free; of a budget that was asked for, half of what the largest other uses leave."""
        others = self.vectors + self.micro_batch + self.all_inverses + self.recycled_bytes if self.asked else 0
        return max(0, total - others) // 2


def halved_to_fit(largest: int, need: int, room: int) -> int:
    """`largest` images, halved until they need no more than there is room for, or one is left."""
    while largest > 1 and largest * need > room:
        largest = (largest + 1) // 2
    return largest


def inverse_bytes(mask: Tensor, element_size: int) -> int:
    """Bytes of the inverses of whole rows of a mask (out, in, ...), padded to the longest."""
    rows = mask.flatten(1).sum(1)
    return len(rows) * max(1, int(rows.max())) ** 2 * element_size


def common_cap(needs: list[int], total: int) -> int:
    """The most that each may have, where those that need less have what they need and all together have `total`."""
    left = total
    for i, need in enumerate(sorted(needs)):
        if need * (len(needs) - i) > left:
            return left // (len(needs) - i)
        left -= need
    return max(needs, default=0)


def parts_within(sizes: list[int], total: int) -> list[slice]:
    """The fewest runs of neighbours that take `total` at the most, or are one that takes more."""
    parts, start = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or sum(sizes[start : end + 1]) > total:
            parts.append(slice(start, end))
            start = end
    return parts


class Allowance:
    """Whether what has been computed since may be kept in memory, or is to be computed again when it is needed.

    most: bytes that it may take; None: half of what is free now.
    """

    def __init__(self, device: torch.device | str, most: int | None):
        self.device, self.before = device, used_memory(device)
        self.most = free_memory(device) // 2 if most is None else most

    def holds(self) -> bool:
        """Others may have taken what was free, and a heap with holes takes more than what is in use."""
        kept = used_memory(self.device) - self.before
        return kept <= self.most and free_memory(self.device) >= self.most / 2
