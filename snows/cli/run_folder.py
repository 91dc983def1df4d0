"""What a run leaves: a folder that loads back, each of its files written whole or not at all.

args.json  environment.json  calibration.json  metrics.json, and, of what is finished, model.safetensors
masks.safetensors  layers.csv  layers.json  report.html. While the run lasts, steps/ (snows/cli/journal.py) besides.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from snows.cli.files import read_json, write, write_json
from snows.deploy.macs import remaining
from snows.errors import SnowsError, UsageError, WriteError
from snows.network.layers import Masks
from snows.result import LOSSES, LayerRecord, Pruned
from snows.zoo import packed
from snows.zoo.checkpoints import fitted

# What a run writes before its first layer, in this order, and the names that each holds; args.json makes a run of it.
BEGUN = {"environment.json": "torch", "calibration.json": "indices", "metrics.json": "dense_accuracy"}


def check_free(path: Path) -> None:
    """Refuse a folder that holds anything but what a run had written that was ended before it had begun.

    Raises:
        UsageError: it does, or is a file, or nothing can be written there.
    """
    if path.exists() and not is_free(path):
        raise UsageError(f"{path} exists and is not empty: choose another --out_dir.")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UsageError(f"{path}: nothing can be written into {there}. Choose another --out_dir.")


def is_free(path: Path) -> bool:
    """Whether a folder holds nothing but what a run writes before it has begun."""
    return path.is_dir() and all(is_begun(file) for file in path.iterdir())


def is_begun(file: Path) -> bool:
    """Whether a file is one that a run writes before args.json: whole, or under the name that it is written as."""
    if file.is_symlink() or not file.is_file():
        return False
    if file.suffix == ".tmp":
        return file.stem in (*BEGUN, "args.json")
    with suppress(UsageError):
        return file.name in BEGUN and not read_json(file, BEGUN[file.name]).get("finished")
    return False


def clear_begun(folder: Path) -> None:
    """Empty the folder of a run that was ended before it had begun, for another to begin in it.

    Raises:
        UsageError: it holds something else by now. WriteError: its files cannot be removed.
    """
    check_free(folder)
    for file in list(folder.iterdir()):
        try:
            file.unlink()
        except OSError as error:
            raise WriteError(f"cannot write {folder}: {error.strerror}.") from error


def new_folder(path: Path | None, name: str) -> Path:
    """Create the run's folder: `path`, or runs/<name>-<time>.

    Raises:
        UsageError: the folder holds a run already. SnowsError: it cannot be created.
    """
    chosen = path or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if path is None:
            return unlike_others(chosen)
        check_free(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnowsError(f"cannot create {chosen}: {error}") from error
    return path


def unlike_others(path: Path) -> Path:
    """Create a folder of that name, with a number after it where another run has taken it already."""
    number = 1
    while True:
        number += 1
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.exists():  # what is in the way is above it
                raise
            path = path.with_name(f"{path.name.removesuffix(f'_{number - 1}')}_{number}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process; the system gives it back even if the process is killed.

    Raises:
        UsageError: another process is writing to it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder} belongs to a run that is still going.") from None
        yield
    finally:
        os.close(handle)


def save(folder: Path, pruned: Pruned, metrics: dict, macs: dict[str, int] | None = None) -> dict:
    """Write weights, masks, per-layer records and metrics; returns the metrics with what was counted and spent.

    macs: multiply-accumulates of the dense network, by layer, where they were counted.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in pruned.model.state_dict().items()}
    masks = {name: mask.cpu().contiguous() for name, mask in pruned.masks.items()}
    macs = macs or {}
    kept = remaining(pruned.model, macs)
    write(folder / "model.safetensors", safetensors.torch.save(unshared(state)))
    write(folder / "masks.safetensors", safetensors.torch.save(masks))
    write(folder / "layers.csv", csv_text(with_macs(layer_rows(pruned.layers), macs, kept)))
    write_json(folder / "layers.json", [asdict(layer) for layer in pruned.layers])
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    names = [name for name, _ in pruned.model.named_parameters()]
    zeros = sum((saved[name] == 0).sum().item() for name in names)
    metrics = {
        **metrics,
        "sparsity": zeros / sum(saved[name].numel() for name in names),  # of the saved weights
        "dense_macs": sum(macs.values()),
        "macs": sum(kept.values()),
        "seconds": pruned.seconds,
        "curvature_products": pruned.curvature_products,
        "cg_iterations": pruned.cg_iterations,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "problems": pruned.problems,
        "left_dense": pruned.left_dense,
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies where two names share memory (tied weights), which safetensors refuses."""
    seen, result = set(), {}
    for name, tensor in state.items():
        pointer = tensor.data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def layer_rows(records: list[LayerRecord]) -> list[dict]:
    """One row per layer: the losses of each sweep (the first without a number), the effort summed over sweeps."""
    rows: dict[str, dict] = {}
    for record in records:
        values = asdict(record)
        sweep, *_ = (values.pop(name) for name in ("sweep", "residuals", "joint"))
        shape = "x".join(map(str, record.shape))
        what = {"name": record.name, "shape": shape, "sparsity": record.sparsity}
        row = rows.setdefault(record.name, {**what, **values, "shape": shape})
        if sweep > 0:
            row |= {"sparsity": record.sparsity, "accuracy": record.accuracy, "batch_size": record.batch_size}
            row["problem"] = record.problem
            row |= {f"{loss}_{sweep + 1}": values[loss] for loss in LOSSES}
            own = () if record.joint else ("newton_steps", "cg_iterations")  # joint steps are no single layer's
            for effort in (*own, "products", "seconds"):
                row[effort] += values[effort]
            row["peak_memory_bytes"] = max(row["peak_memory_bytes"], record.peak_memory_bytes)
    return list(rows.values())


def with_macs(rows: list[dict], dense: dict[str, int], kept: dict[str, int]) -> list[dict]:
    """The rows with each layer's multiply-accumulates for an image, dense and without its zeros."""
    return [{**row, "dense_macs": dense.get(row["name"]), "macs": kept.get(row["name"])} for row in rows]


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV; the columns are those of any row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def load(folder: str | Path, model: nn.Module) -> tuple[nn.Module, Masks]:
    """Load a run folder's weights into `model`, a network of the same architecture; returns it and the masks.

    folder: it, where without model.safetensors packed.safetensors is taken; or such a packed file alone.

    Raises:
        UsageError: the model is none. SnowsError: a file is missing or damaged, or the weights do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"a network is needed to load the weights into, not {model!r}.")
    folder = Path(folder)
    file = folder / "model.safetensors" if folder.is_dir() else folder
    if not file.exists() and (folder / packed.FILE).exists():
        file = folder / packed.FILE
    try:
        state, masks = packed.unpack(file) if packed.is_packed(file) else load_unpacked(folder)
        model.load_state_dict(fitted(state, model.state_dict(), file))
        return model, masks
    except (OSError, safetensors.SafetensorError, RuntimeError, KeyError, ValueError, UsageError) as error:
        raise SnowsError(f"cannot load {folder}: {error}") from error


def load_unpacked(folder: Path) -> tuple[dict[str, torch.Tensor], Masks]:
    """The weights and the masks of a run folder."""
    names = ("model.safetensors", "masks.safetensors")
    state, masks = (safetensors.torch.load_file(folder / name) for name in names)
    return state, masks
