"""How much memory a device has left, what is in use, and the most that was."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30

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
