"""Commands that torchrun or SLURM starts as several processes: they become one group, of which the first speaks."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from snows.distributed import SILENCE, Group, current
from snows.memory import is_gpu

TOLD = "snows told"  # in the store that the processes share: whether one has said why they end
PATIENCE = 5.0  # seconds that the others leave the first process to say it


def place(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process among others, None of one alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {"LOCAL_RANK": "0", **environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:  # of `srun`; a job's own script is one process
        return None
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000)),
    }


def first_host(hosts: str) -> str:
    """The first of a list as SLURM writes it: "node[03-05,09],other" begins with node03."""
    return re.sub(r"^([^,\[]*)(?:\[(\w+)[^\]]*\])?.*", r"\1\2", hosts)


def follows() -> bool:
    """Whether this process is one of several, and not the first, which alone speaks and writes."""
    own = place(os.environ)
    return own is not None and int(own["RANK"]) > 0


def own_device(device: str) -> str:
    """The GPU of this process, where several have one each and none is named."""
    own = place(os.environ)
    return f"cuda:{own['LOCAL_RANK']}" if own is not None and device == "cuda" else device


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The processes of this command: what ends one of them ends them all."""
    own = place(os.environ)
    if own is None:
        yield current()
        return
    os.environ.update({name: own[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
    if is_gpu(device):
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu(device) else "gloo", timeout=SILENCE)
    with current().together():
        yield current()
    dist.destroy_process_group()  # where they end well: the end of a process closes its connections in any case


def speaks() -> bool:
    """Whether this process is to say why they all end: the first does, and if that is gone, one of the others."""
    if not follows():
        told_by_others()
        return True
    if not dist.is_initialized():
        return False  # what ended it ends the first alike
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if told_by_others(ask=True):
            return False
        time.sleep(0.1)
    return not told_by_others()


def told_by_others(ask: bool = False) -> bool:
    """Whether another process has said it; if this one does not only ask, it is said now."""
    if not dist.is_initialized():
        return False
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.check([TOLD]) if ask else store.add(TOLD, 1) > 1
    except RuntimeError:  # it was kept by a process that is gone
        return False
