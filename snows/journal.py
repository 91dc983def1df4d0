"""The finished layers of a run, one file each, from which a run that was stopped goes on.

steps/0000.safetensors, steps/0001.safetensors, ... in the run's folder: a layer's weight, its mask and the shift of its
bias, and as metadata its record and a checksum. Each is written whole or not at all, once, when its layer is finished.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from snows.errors import UsageError, WriteError
from snows.result import LayerRecord, Step
from snows.run_folder import write


class Journal:
    """The steps in a run's folder: iterating reads them back in order, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder / "steps"

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def __iter__(self) -> Iterator[Step]:
        return (read(self.folder / f"{number:04}.safetensors") for number in range(len(self)))

    def append(self, step: Step) -> None:
        """Keep a finished layer.

        Raises:
            WriteError: the disk is full, or the folder cannot be written.
        """
        tensors = {"weight": step.weight, "mask": step.mask}
        if step.shift is not None:
            tensors["shift"] = step.shift
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"record": json.dumps(asdict(step.record)), "checksum": checksum(tensors.values())}
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot write {self.folder}: {error.strerror}.") from error
        write(self.folder / f"{len(self):04}.safetensors", safetensors.torch.save(tensors, metadata))

    def clear(self) -> None:
        """Forget the steps of a run that has ended: its other files hold all there is to know."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(path: Path) -> Step:
    """One step.

    Raises:
        UsageError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata()
        record = json.loads(metadata["record"])
        step = Step(LayerRecord(**{**record, "shape": tuple(record["shape"])}), **tensors)
        intact = checksum(tensors[name] for name in ("weight", "mask", "shift") if name in tensors)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UsageError(damaged(path, error)) from error
    if intact != metadata["checksum"]:
        raise UsageError(damaged(path, "its checksum is wrong"))
    return step


def damaged(path: Path, reason: object) -> str:
    return f"{path} is damaged ({reason}): delete it and those numbered after it, and the run goes on before it."


def checksum(tensors: Iterable[Tensor]) -> str:
    """A CRC-32 of the tensors' bytes, in order."""
    value = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        value = zlib.crc32(flat.view(torch.uint8).numpy(), value)
    return f"{value:08x}"
