"""How much memory a device has left, the most that was in use, and what a job may use of it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snows.options import Options

GIB = 2**30
MICRO_BATCH = 2**30  # bytes that a micro-batch may need on the host, if there is four times as much
GPU_MICRO_BATCH = 2**33  # and on a device of its own
MAX_BYTES = 2**29  # of all the inverses of a layer; beyond it each row's support is cut into smaller blocks
ALL_BYTES = 2**30  # of the inverses of all layers together, in the joint steps
RECYCLED_BYTES = 2**31  # of the products that the next Newton step is preconditioned with

Limit = tuple[int, int]  # bytes: the most that there may be, and what is in use

# What RuntimeErrors say that mean no more than that: the CPU's allocator, oneDNN under RLIMIT_AS, CUDA, cuBLAS, cuDNN.
OUT_OF_MEMORY = (
    *(
        "can't allocate memory",
        "Cannot allocate memory",
        "could not create a primitive",
        "could not create a memory",
        "out of memory",
    ),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
)


def is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in the words of torch, of its libraries or of Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def free_memory(device: torch.device | str) -> int:
    """Free bytes on a device. On the host: what the machine, its container (cgroup v1, v2) and ulimit all leave."""
    if is_gpu(device):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = []
    with contextlib.suppress(OSError, StopIteration):  # what the kernel can hand out, its file cache included
        left.append(kibibytes(Path("/proc/meminfo"), "MemAvailable"))
    left += [limit - used for limit, used in (*_containers(), *_process_limits())]
    return max(0, min(left, default=4 * 2**30))  # where the system does not tell


def _containers(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> Iterator[Limit]:
    """(limit, in use) of the control groups that this process is in, and of those around them.

    Pages of files count there, but are given up when memory is asked for: those not in use lately are taken off.
    """
    with contextlib.suppress(OSError):
        for line in process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            v2 = not controllers
            if not v2 and "memory" not in controllers.split(","):
                continue
            base = root if v2 else root / "memory"
            names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            inner = base / path.lstrip("/")
            # Inside a container the path may be the host's, and its own group is at the root.
            for group in dict.fromkeys((inner, *inner.parents, base)):
                if group.is_relative_to(base):
                    yield from _control_group(group, *names)


def _control_group(group: Path, limit: str, usage: str) -> Iterator[Limit]:
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        most, used = (int((group / name).read_text()) for name in (limit, usage))
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = fields.get("total_inactive_file", fields.get("inactive_file", 0))  # v1 sums groups under "total_"
        yield most, used - int(reclaimable)


def _process_limits(status: Path = Path("/proc/self/status")) -> Iterator[Limit]:
    """(limit, in use) of this process's address space and data, where ulimit bounds them."""
    for which, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(which)
        if most != resource.RLIM_INFINITY:
            with contextlib.suppress(OSError, StopIteration):
                yield most, kibibytes(status, field)


class _Heap(ctypes.Structure):
    """The struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def used_memory(device: torch.device | str) -> int:
    """Bytes of a device that this process uses now; what the C library keeps for later use does not count."""
    if is_gpu(device):
        return torch.cuda.memory_allocated(device)
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (OSError, TypeError, AttributeError):  # not glibc, or an old one
        return peak_memory(device)
    mallinfo.restype = _Heap
    heap = mallinfo()
    return heap.uordblks + heap.hblkhd


def peak_memory(device: torch.device | str) -> int:
    """Most bytes in use since `forget_peak`: of the GPU where there is one, else of this process."""
    if is_gpu(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        return kibibytes(Path("/proc/self/status"), "VmHWM")
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device | str) -> None:
    """Start `peak_memory` anew, where the system can, after handing back what has been freed."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # else it is the peak of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def keep_freed_memory() -> None:
    """Ask the C library not to hand freed blocks back to the system by itself, for the whole process.

    A product allocates the same large features again and again; returned to the system, each of their pages is zeroed
    and mapped anew. `forget_peak` hands them back between layers, whose features differ in size: blocks of one would
    lie unused beside those of the next. Does nothing where the C library is not glibc.
    """
    mmap_max, trim_threshold = -4, -1  # the parameters M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3)
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def kibibytes(file: Path, field: str) -> int:
    """The bytes that a line "field: n kB" of a /proc file states."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


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
        return min(MAX_BYTES, self.device // 4)

    @property
    def all_inverses(self) -> int:
        """Bytes for the inverses of all the layers together."""
        return min(ALL_BYTES, self.device // 4)

    @property
    def recycled_bytes(self) -> int:
        """Bytes for the products of earlier Newton steps."""
        others = self.vectors + self.micro_batch + self.all_inverses
        return min(RECYCLED_BYTES, max(0, self.device - others) // 4)

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
