"""Files of tensors as training scripts leave them: read without running code, and brought to a network's names."""

from __future__ import annotations

import argparse
import datetime
import logging
import pathlib
import re
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from snows.errors import UsageError, first_line, listed
from snows.zoo import packed

log = logging.getLogger("snows")
State = dict[str, Tensor]

# Keys that files hold their tensors under; the first that a file has is taken.
WRAPPERS = ["state_dict", "model_state_dict", "model", "masks", "net", "module", "weights", "params"]
WRAPPERS += ["state_dict_ema", "model_ema", "params_ema", "ema"]
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # that DataParallel and torch.compile put before every name
COUNTER = "num_batches_tracked"  # of BatchNorm, which no evaluation reads; files before torch 0.4.1 have none
MASK_OF = "_mask"  # after a parameter's name: what torch.nn.utils.prune keeps in a checkpoint, and
DENSE_OF = "_orig"  # the parameter as it was
ASP_MASK = re.compile(r"(^|\.)__(\w+)_mma_mask$")  # what NVIDIA's ASP keeps beside a weight that it has masked, and
ASP_REST = re.compile(r"(^|\.)__\w+_mma_pruned_p$")  # what it would undo the masking with

# Classes beside the weights that do nothing when they are made, besides those that torch takes itself.
HARMLESS: list[Any] = [argparse.Namespace, types.SimpleNamespace, np.dtype, np.ndarray]
HARMLESS += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
HARMLESS += [datetime.datetime, datetime.date, datetime.timedelta]
for core in ("numpy._core", "numpy.core"):  # the latter before numpy 2
    HARMLESS += [(np.float64(0).__reduce__()[0], f"{core}.multiarray.scalar")]
    HARMLESS += [(np.empty(0).__reduce__()[0], f"{core}.multiarray._reconstruct")]
for home in ("pathlib", "pathlib._local"):  # the latter in Python 3.13
    for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
        HARMLESS += [(pathlib.PurePosixPath, f"{home}.{name}")]


def read_state(path: Path, key: str | None = None) -> State:
    """The tensors of a file, by name, without the prefixes and the dict around them that training scripts add.

    key: the entry to take, where the file has several; by default the first that is known.

    Raises:
        UsageError: the file is missing, damaged or of another kind, or holds no such tensors.
    """
    content = read_file(path)
    state = flattened(unwrapped(content if key is None else entry(content, key, path), path))
    if isinstance(state, dict):
        state = {name: as_tensor(value) for name, value in state.items()}
    if not isinstance(state, dict) or not state or not all(map(is_named_tensor, state.items())):
        found = ""
        if isinstance(content, dict) and content:
            found = f", but {listed(map(str, content))}: `checkpoint_key` says which of these, if one does"
        raise UsageError(f"{path} holds no state dict (names and dense tensors){found}.")
    return {PREFIXES.sub("", name): tensor for name, tensor in state.items()}


def read_file(path: Path) -> Any:
    """What a file of torch.save or safetensors holds, told apart by its first bytes, whatever it is called.

    A packed one (snows/zoo/packed.py) is unpacked.

    Raises:
        UsageError: it is missing, damaged, or something else; the message says what.
    """
    if re.match(r"https?:/", str(path)):
        raise UsageError(f"{path} is an address: download the file, and give its path.")
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        raise UsageError(f"{path} is a folder: give a file of weights{f', as {listed(files)}' if files else ''}.")
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        refuse_other_kinds(path, start)
        if is_safetensors(path, start):
            return packed.unpack(path)[0] if packed.is_packed(path) else safetensors.torch.load_file(path)
        with open(path, "rb") as file, torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the message below says
            return torch.load(file, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # what damaged bytes raise in either format has no end
        raise UsageError(f"{path} {why_not_read(path, error)}") from error


def refuse_other_kinds(path: Path, start: bytes) -> None:
    """Refuse files that stand where weights should be.

    Raises:
        UsageError: it says what the file is.
    """
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a pointer of git-LFS, not the file itself: run git lfs pull where it lies.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UsageError(f"{path} is a web page, as a failed download leaves it, and no file of weights.")
    if not start:
        raise UsageError(f"{path} is empty: it is damaged or no checkpoint of plain tensors.")


def is_safetensors(path: Path, start: bytes) -> bool:
    """Whether a file begins as safetensors do, with the size of a JSON header; a bad one keeps what it is called."""
    size = int.from_bytes(start[:8], "little")
    begins = len(start) > 8 and start[8:9] == b"{" and size < path.stat().st_size
    return begins or (path.suffix == ".safetensors" and not start.startswith(b"PK"))


def why_not_read(path: Path, error: Exception) -> str:
    """What a file is that torch refuses, in plain words: its own would have the user run whatever code is in it."""
    if "TorchScript" in str(error):
        return "is a TorchScript archive: load it with torch.jit.load, and save its state_dict()."
    classes = classes_in_the_way(path, error)
    if any(name.startswith("torch.nn.modules.") for name in classes):
        own = [name for name in classes if not name.startswith(("torch.", "builtins."))] or classes
        return f"is a whole pickled network ({listed(own)}), not its weights: save its state_dict() instead."
    if classes:
        return (
            f"holds objects of {listed(classes)}, which no file of weights should need and which are not made, since "
            f"that could run any code: save the network's state_dict() alone."
        )
    plain = re.sub(r"\x1b\[[\d;]*m", "", first_line(error))
    reason = "" if "weights_only" in plain else f": {plain}"
    return f"is damaged or no checkpoint of plain tensors{reason}"


def classes_in_the_way(path: Path, error: Exception) -> list[str]:
    """The classes and functions that a pickle names and that are not known to be harmless."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return sorted({*unsafe, *re.findall(r"but got <class '([\w.]+)'>", str(error))})
    except Exception:  # damaged, or in the format before torch 1.6
        return re.findall(r"GLOBAL (\S+)", str(error))


def entry(content: Any, key: str, path: Path) -> Any:
    """The part of a file's content that the user names: an entry, or all tensors whose names begin with it and a dot.

    Raises:
        UsageError: there is none.
    """
    names = list(content) if isinstance(content, dict) else []
    if key in names:
        return content[key]
    inner = unwrapped(content, path)
    begin = f"{key.removesuffix('.')}."
    found = {name: value for name, value in inner.items() if str(name).startswith(begin)} if names else {}
    if not found:
        raise UsageError(f"{path} has no entry '{key}' (`checkpoint_key`), but {listed(map(str, names)) or 'none'}.")
    return {name.removeprefix(begin): value for name, value in found.items()}


def unwrapped(content: Any, path: Path) -> Any:
    """What lies under the usual keys; says which one was taken where there are several."""
    while isinstance(content, dict):
        found = [key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]]
        if not found:
            break
        if len(found) > 1:
            log.info("took %s of %s, which also holds %s (`checkpoint_key`)", found[0], path, listed(found[1:]))
        content = content[found[0]]
    return content


def flattened(content: Any) -> Any:
    """Tensors in dicts of dicts, as nni writes its masks, under names with dots; what is None is left out."""
    if not isinstance(content, dict) or not any(isinstance(inner, dict) for inner in content.values()):
        return content
    flat: dict[str, Any] = {}
    for name, inner in content.items():
        if isinstance(inner, dict):
            flat |= {f"{name}.{below}": value for below, value in flattened(inner).items() if value is not None}
        else:
            flat[name] = inner
    return flat


def as_tensor(value: Any) -> Any:
    """A NumPy array of numbers, or a sparse tensor, as a dense tensor; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=True))
    if isinstance(value, Tensor) and value.layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        return value.to_dense()
    return value


def is_named_tensor(entry: tuple) -> bool:
    """A name and a tensor with a number at every place: not nested, quantised, or without data."""
    name, tensor = entry
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def fitted(state: State, own: State, path: Path) -> State:
    """A file's tensors under a network's own names; own: the network's tensors.

    A prefix of all of the network's names is taken off, and what lies outside of it left out; masks that a tool keeps
    beside weights are put into them; counters that the file lacks are the network's.

    Raises:
        UsageError: names or shapes do not fit; the message lists both sides.
    """
    state = masked(state)
    prefix = common_prefix(state, own)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "n_averaged" not in own:
        inside.pop("n_averaged", None)  # how many networks torch's AveragedModel has seen
    missing = [name for name in own if name not in inside and not name.endswith(COUNTER)]
    unexpected = [prefix + name for name in inside if name not in own]
    shapes = [
        f"{name} has shape {tuple(inside[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in inside and inside[name].shape != own[name].shape
    ]
    problems = [f"missing {listed(missing)}"] if missing else []
    problems += [f"unexpected {listed(unexpected)}"] if unexpected else []
    problems += [listed(shapes)] if shapes else []
    if problems:
        raise UsageError(f"{path} does not fit the network: {'; '.join(problems)}.")
    outside = [name for name in state if not name.startswith(prefix)]
    if outside:
        log.info("took what begins with %s of %s, and left out %s (`checkpoint_key`)", prefix, path, listed(outside))
    return {name: inside.get(name, tensor) for name, tensor in own.items()}


def common_prefix(names: State, own: State) -> str:
    """What stands before most of a network's names in a file, as "model." or "net.backbone."; mostly nothing."""
    found = Counter({"": 0})
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        found.update(name[:start] for start in starts if name[start:] in own)
    return max(found, key=lambda prefix: found[prefix])


def masked(state: State) -> State:
    """Weights as they act, where torch.nn.utils.prune keeps them apart from their masks, or ASP masks beside them."""
    acting = {}
    for name, tensor in state.items():
        parameter = name.removesuffix(MASK_OF).removesuffix(DENSE_OF)
        dense, mask = state.get(parameter + DENSE_OF), state.get(parameter + MASK_OF)
        if dense is not None and mask is not None and dense.shape == mask.shape:
            acting[parameter] = torch.where(mask.bool(), dense, torch.zeros_like(dense))
        elif not (ASP_MASK.search(name) or ASP_REST.search(name)):
            acting[name] = tensor
    return acting
