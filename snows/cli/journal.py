"""The finished layers of a run, one file each, from which a run that was stopped goes on.

steps/0000.safetensors, steps/0001.safetensors, ... in the run's folder: a layer's weight, its mask and the shift of its
bias, and as metadata its record and a checksum of them all. Each is written whole or not at all, after its layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from torch import Tensor

from snows.checksum import checksum
from snows.cli.files import write
from snows.errors import UsageError, WriteError, first_line
from snows.memory import is_out_of_memory
from snows.result import LayerRecord, Step


class Journal:
    """The steps in a run's folder: iterating reads them back in order, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder / "steps"
        self.place = 0  # of the next step among all of the run's

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.safetensors")))

    def __iter__(self) -> Iterator[Step]:
        return (read(self.folder / f"{number:04}.safetensors") for number in range(len(self)))

    def append(self, step: Step) -> None:
        """Keep a finished layer, in place of the one that stands there, if joint steps had been written in part.

        Raises:
            WriteError: the disk is full, or the folder cannot be written.
        """
        tensors = {"weight": step.weight, "mask": step.mask}
        if step.bias_update is not None:
            tensors["bias_update"] = step.bias_update
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = json.dumps(asdict(step.record))
        metadata = {"record": record, "checksum": fingerprint(record, tensors)}
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot write {self.folder}: {error.strerror}.") from error
        write(self.folder / f"{self.place:04}.safetensors", safetensors.torch.save(tensors, metadata))
        self.place += 1

    def pass_over(self) -> None:
        """Leave a step as it stands there: an earlier call's."""
        self.place += 1

    def clear(self) -> None:
        """Forget the steps of a run that has ended: its other files hold all there is to know."""
        shutil.rmtree(self.folder, ignore_errors=True)


def read(path: Path) -> Step:
    """One step.

    Raises:
        UsageError: the file is missing or damaged. OSError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        tensors, metadata = safetensors.torch.load(content), header(content)["__metadata__"]
        if metadata["checksum"] != fingerprint(metadata["record"], tensors):
            raise ValueError("its checksum is wrong")
        return Step(LayerRecord.of(json.loads(metadata["record"])), **tensors)
    except Exception as error:  # what damaged bytes raise has no end
        sound = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if sound or is_out_of_memory(error):
            raise
        raise UsageError(damaged(path, first_line(error))) from error


def header(content: bytes) -> dict:
    """What a safetensors file says of itself: the JSON after the eight bytes that hold its length."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def damaged(path: Path, reason: object) -> str:
    return f"{path} is damaged ({reason}): delete it and those numbered after it, and the run goes on before it."


def fingerprint(record: str, tensors: dict[str, Tensor]) -> str:
    """A checksum of a record and of named tensors: their names, types, shapes and numbers."""
    kinds = {name: (str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)}
    return checksum((tensors[name] for name in kinds), json.dumps([record, kinds]))
