"""What a job holds of the calibration images: on the device while there is room, then on the host, then in files.

A micro-batch's values are put into the first place that has room for them and are read back on the device, with the
layout in memory that they had, so that where they lie changes no bit of what is computed from them. Files are mapped
into memory when they are read: the system's page cache decides which of their pages stay.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from snows.calibration.staging import Staging, Upload, extent, laid_flat, nbytes, places
from snows.errors import WriteError
from snows.memory import is_gpu, is_out_of_memory

LARGE = 2**30  # bytes of images that are not held in memory alone
SCRATCH = "snows-scratch-"  # what the names of folders with such files begin with

Values = dict[Any, Any]  # by name or node: tensors, and plain numbers that are kept as they are


@dataclass(frozen=True)
class _Mapped:
    """A tensor in a file: where it begins, and how it lies there."""

    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    extent: int

    def of(self, content: Tensor) -> Tensor:
        """The tensor, of the file's bytes."""
        end = self.start + self.extent * self.dtype.itemsize
        return content[self.start : end].view(self.dtype).as_strided(self.shape, self.stride)


class Held:
    """A micro-batch's values, wherever they lie; gone from there once nothing refers to this object any more."""

    def __init__(self, store: Store, place: str, values: Values, size: int, path: Path | None = None):
        self.store, self.place, self.values, self.path = store, place, values, path
        self.pending: tuple[Collection | None, Upload] | None = None  # of which values, an upload that was begun
        weakref.finalize(self, store._give_back, place, size, path)

    def expect(self, names: Collection | None = None) -> None:
        """Begin to move values to the device, to be read there next, where that can go on during other work."""
        if self.place == "device" or self.store.staging is None:
            return
        try:
            self.pending = names, self.store.staging.upload(self._named(names))
        except (RuntimeError, MemoryError) as error:  # then they are moved when they are read
            if not is_out_of_memory(error):
                raise

    def get(self, names: Collection | None = None) -> Values:
        """The values on the device, all of them or those that are named."""
        (expected, upload), self.pending = self.pending or (None, None), None
        if upload is not None and expected == names:
            return upload.result()
        values = self._named(names)
        if self.place == "device" or self.store.on_host:
            return values
        if self.store.staging is not None:
            return self.store.staging.upload(values).result()
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.store.device), values)

    def _named(self, names: Collection | None) -> Values:
        """The values that are named, or all, where they lie."""
        values = {name: value for name, value in self.values.items() if names is None or name in names}
        if self.path is None:
            return values
        size = self.path.stat().st_size
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8) if size else None
        return tree_map_only(_Mapped, lambda tensor: tensor.of(content), values)


class Store:
    """The places for a job's values, and how much room is left in each.

    device_bytes, host_bytes: the room on the device and on the host (one and the same where the device is the CPU: the
        host's counts). cache_dir: where files go, those that a run left when it was killed are removed from there;
        "": the first of the system's folders for such files that is not itself in memory.
    """

    def __init__(
        self, device: torch.device | str, device_bytes: int = 2**62, host_bytes: int = 2**62, cache_dir: str = ""
    ):
        self.device, self.on_host = torch.device(device), torch.device(device).type == "cpu"
        self.room = {"device": 0 if self.on_host else device_bytes, "host": host_bytes, "files": 2**62}
        self.most = dict.fromkeys(self.room, 0)  # bytes held in each place at a time, at the most
        self.held = dict.fromkeys(self.room, 0)
        self.staging = Staging(self.device) if is_gpu(device) else None
        self.cache_dir, self.numbers = cache_dir, count()
        self._folder: Path | None = None

    def put(self, values: Values, files: bool = True) -> Any:
        """Values that are on the device, `Held`; None where there is no room for them, and `files` are not wanted.

        Raises:
            WriteError: the disk is full.
        """
        size = nbytes(values)
        places = [place for place in ("device", "host") if self.held[place] + size <= self.room[place]]
        if not places and not files:
            return None
        place, path = next(iter(places), "files"), None
        if place == "host" and not self.on_host:
            values = self._download(values)
        elif place == "files":
            values, path = self._write(values if self.on_host else self._download(values))
        self.held[place] += size
        self.most[place] = max(self.most[place], self.held[place])
        return Held(self, place, values, size, path)

    def _download(self, values: Values) -> Values:
        if self.staging is not None:
            return self.staging.download(values)
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), values)

    def _give_back(self, place: str, size: int, path: Path | None) -> None:
        self.held[place] -= size
        if path is not None:
            path.unlink(missing_ok=True)

    def _write(self, values: Values) -> tuple[Values, Path]:
        """(values with a description in place of each tensor, the file that holds them)"""
        path = self.folder / str(next(self.numbers))
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        starts, end = places(tensors)
        try:
            with open(path, "wb") as file:
                for start, tensor in zip(starts, tensors):
                    file.seek(start)
                    file.write(laid_flat(tensor).view(torch.uint8).numpy())
                file.truncate(end)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            raise WriteError(
                f"cannot write {path}: {error.strerror}. It holds features that do not fit the memory: name a folder "
                f"with more room (`cache_dir`), or raise `memory_budget`."
            ) from error
        rest = iter(starts)
        described = tree_map_only(
            Tensor, lambda t: _Mapped(next(rest), t.dtype, t.shape, t.stride(), extent(t)), values
        )
        return described, path

    @property
    def folder(self) -> Path:
        """The folder of this store's files, made when the first is written and removed with the store."""
        if self._folder is None:
            parent = Path(self.cache_dir) if self.cache_dir else default_cache_dir()
            try:
                parent.mkdir(parents=True, exist_ok=True)
                remove_left_over(parent)
                folder, lock = own_folder(parent)
            except OSError as error:
                raise WriteError(f"cannot write into {parent}: {error.strerror} (`cache_dir`).") from error
            weakref.finalize(self, _remove, folder, lock)
            self._folder = folder
        return self._folder


def room_for(shape: torch.Size, dtype: torch.dtype, cache_dir: str = "") -> Tensor:
    """A new tensor of the host; if it is large, in a file, whose pages the system may give up. The file has no name.

    Raises:
        WriteError: the file cannot be written.
    """
    size = shape.numel() * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    parent = Path(cache_dir) if cache_dir else default_cache_dir()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=SCRATCH, dir=parent) as file:
            take_lock(file.fileno())
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would end the process at a later page
            return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise WriteError(
            f"cannot write {size >> 20} MiB of images into {parent}: {error.strerror}. Name a folder with more room "
            f"(`cache_dir`)."
        ) from error


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def own_folder(parent: Path) -> tuple[Path, int]:
    """(a new folder, its lock, held while this process lives), which no other run removes as left over."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another run took it for left over, before it was locked
            continue
        if take_lock(lock) is not False and folder.exists():
            return folder, lock
        os.close(lock)


def take_lock(file: int) -> bool | None:
    """Whether the lock of an open file or folder is ours now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_left_over(parent: Path) -> None:
    """Remove what runs that were killed have left: nobody holds its lock any more."""
    for path in parent.glob(f"{SCRATCH}*"):
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:  # another user's, or gone by now
            continue
        if take_lock(lock):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        os.close(lock)


def default_cache_dir() -> Path:
    """The first of the usual folders for temporary files that is on a disk, not in memory."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    return next((each for each in candidates if each.is_dir() and not is_in_memory(each)), candidates[0])


def is_in_memory(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a folder's file system keeps its files in memory."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return False
    folder = folder.resolve()
    around = [(len(place), kind) for _, place, kind, *_ in lines if folder.is_relative_to(place)]
    return max(around, default=(0, ""))[1] in ("tmpfs", "ramfs")
