"""The versions and the machine of a run, as far as they bear on its figures."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import timm
import torch
import torchvision

from snows.distributed import current


def environment_of(device: torch.device | str) -> dict:
    """Versions and machine, as far as they bear on the figures."""
    cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "processes": current().size,
        "cuda": torch.version.cuda if cuda else None,
        "command": " ".join(map(without_folders, sys.argv)),
    }


def without_folders(arg: str) -> str:
    """An argument without the folders of this machine in front of a name: its own, or behind `=` or `transformers:`."""
    return re.sub(r"(^|[:=])/(?:[^/]+/)*(?=[^/])", r"\1", arg)


def machine(device: torch.device | str = "cpu") -> str:
    """The processor's name and number of cores, or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
