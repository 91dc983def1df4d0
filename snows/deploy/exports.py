"""The table of exports, and how one comes about: written aside, read back, checked, and only then put in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from snows.deploy import int8, onnx, pt2, timm_folder, transformers_folder
from snows.deploy.checks import Check, Logits, ReadBack, check
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.packages import HOW_TO_INSTALL, missing
from snows.errors import SnowsError, UsageError, WriteError
from snows.network.network import copied
from snows.zoo import packed

AS_IT_IS = ExportOptions()


def write_packed(deployable: Deployable, file: Path, how: ExportOptions) -> None:
    """Write the packed checkpoint: all parameters and buffers by their names, bit for bit."""
    state = deployable.model.state_dict()
    if how.half:
        state = {name: each.half() if each.is_floating_point() else each for name, each in state.items()}
    file.write_bytes(packed.pack(state, deployable.masks))


def read_packed(file: Path, deployable: Deployable) -> ReadBack:
    """The network with the tensors of the packed checkpoint."""
    state, _ = packed.unpack(file)
    return pt2.run_with(copied(deployable.model), state)


@dataclass(frozen=True)
class Export:
    """A kind of file: its name in a run folder, how it is written and read back, and the packages that it needs.

    folded: whether BatchNorms are folded in it; else its tensors are the network's own. beside: the endings of files
    that belong to it. check_network: refuses, with a UsageError, networks that it cannot be made of.
    """

    file: str
    write: Callable[[Deployable, Path, ExportOptions], None]
    read: Callable[[Path, Deployable], ReadBack]
    needs: tuple[str, ...] = ()
    folded: bool = True
    beside: tuple[str, ...] = ()
    check_network: Callable[[nn.Module], None] = lambda model: None


EXPORTS = {
    "onnx": Export("model.onnx", onnx.write, onnx.read, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": Export("model.pt2", pt2.write, pt2.read),
    "timm": Export("timm", timm_folder.write, timm_folder.read, folded=False, check_network=timm_folder.check_network),
    "transformers": Export(
        "transformers",
        transformers_folder.write,
        transformers_folder.read,
        folded=False,
        check_network=transformers_folder.check_network,
    ),
    "packed": Export(packed.FILE, write_packed, read_packed, folded=False),
    "int8": Export("int8.xml", int8.write, int8.read, ("openvino", "nncf"), beside=(".bin",)),
}


def check_exports(names: Iterable[str], how: ExportOptions) -> None:
    """Refuse, before any work, exports that cannot be.

    Raises:
        UsageError: a package is missing, int8 is to be in fp16, or its tolerance is no number.
    """
    names = list(names)
    if how.half and "int8" in names:
        raise UsageError("`half` is for the other exports: int8 has a precision of its own.")
    if not how.int8_tolerance >= 0:
        raise UsageError(f"`int8_tolerance` is a number of percent points, 0 or more, not {how.int8_tolerance:g}.")
    absent = missing(package for name in names for package in EXPORTS[name].needs)
    if absent:
        raise UsageError(f"{' and '.join(absent)} not installed, which {', '.join(names)} needs: {HOW_TO_INSTALL}.")


def check_place(name: str, out: Path) -> None:
    """Refuse a place that an export cannot be written to.

    Raises:
        UsageError: it has another ending. WriteError: its folder is missing, or takes no files.
    """
    ending = Path(EXPORTS[name].file).suffix
    if out.suffix != ending:
        raise UsageError(
            f"{out} cannot be {name}, which is {f'a file that ends in {ending}' if ending else 'a folder'}."
        )
    with writing(out), beside(out):
        pass


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises: WriteError: the file system refuses."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {out}: {error.strerror or error}.") from error


def beside(out: Path) -> tempfile.TemporaryDirectory:
    """A folder on the same file system, from which a file can be moved to `out` at once."""
    return tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent)


def export(
    deployable: Deployable, name: str, out: Path, how: ExportOptions = AS_IT_IS, before: Logits | None = None
) -> Check:
    """Export a network to `out`, unless the file does not hold what it must; returns what was found in it.

    before: the logits of the network in PyTorch, where they are known.

    Raises:
        UsageError: the network, its packages or the name of `out` do not allow it. WriteError: `out` cannot be written.
        SnowsError: the network cannot be exported; zeros, pattern or, in int8, too much accuracy are lost.
    """
    check_exports([name], how)
    kind = EXPORTS[name]
    check_place(name, out)
    before = before or Logits(deployable.model, deployable)
    weights = deployable.weights(deployable.folded if kind.folded else deployable.model)
    try:
        with writing(out), beside(out) as aside:
            file = Path(aside, out.name)
            kind.write(deployable, file, how)
            written = sorted(each for each in Path(aside).rglob("*") if each.is_file())
            found = check(deployable, before, kind.read(file, deployable), weights, written)
            if name == "int8":
                check_tolerance(found, how)
            for part in (file, *(file.with_suffix(ending) for ending in kind.beside)):
                put(part, out.with_name(part.name))
    except WriteError:
        raise
    except SnowsError as error:
        error.args = (f"{name}: {error}",)
        raise
    return found


def check_tolerance(found: Check, how: ExportOptions) -> None:
    """Refuse int8 that loses too much.

    Raises:
        SnowsError: it says how much, and what to do.
    """
    if found.accuracy is None or found.accuracy_before is None:
        return
    if found.accuracy_before - found.accuracy > how.int8_tolerance:
        raise SnowsError(
            f"the accuracy falls from {found.accuracy_before:.2f} to {found.accuracy:.2f} %, by more than the "
            f"{how.int8_tolerance:g} points of `int8_tolerance`: leave more layers in float (`int8_float`)."
        )


def put(part: Path, place: Path) -> None:
    """Move a file or a folder to its place; what an earlier export left there goes."""
    if place.is_dir() and (place / "config.json").exists():
        shutil.rmtree(place)
    os.replace(part, place)
