"""What a run leaves: the table on the screen and a folder that loads back.

args.json  environment.json  metrics.json  layers.csv  calibration.json  model.safetensors  masks.safetensors
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from tqdm import tqdm

from snows.errors import SnowsError, UsageError
from snows.masks import Masks
from snows.pipeline import LayerRecord, Pruned


def new_folder(path: Path | None, name: str) -> Path:
    """Create the run's folder: `path`, or runs/<name>-<time>.

    Raises:
        UsageError: the folder holds a run already. SnowsError: it cannot be created.
    """
    path = path or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty: choose another --out_dir.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SnowsError(f"cannot create {path}: {error}") from error
    return path


def environment(device: torch.device | str) -> dict:
    """Versions and machine, as far as they bear on the figures."""
    cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


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


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
        SnowsError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SnowsError(
            f"cannot write {path}: {error}. Make room and run again, or choose another --out_dir."
        ) from error


def write_json(path: Path, record: dict) -> None:
    write(path, json.dumps(record, indent=2, default=str) + "\n")


def save(folder: Path, pruned: Pruned, metrics: dict) -> dict:
    """Write weights, masks, per-layer records and metrics; returns the metrics with the saved weights' sparsity."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in pruned.model.state_dict().items()}
    masks = {name: mask.cpu().contiguous() for name, mask in pruned.masks.items()}
    write(folder / "model.safetensors", safetensors.torch.save(unshared(state)))
    write(folder / "masks.safetensors", safetensors.torch.save(masks))
    write(folder / "layers.csv", csv_text(layer_rows(pruned.layers)))
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    names = [name for name, _ in pruned.model.named_parameters()]
    zeros = sum((saved[name] == 0).sum().item() for name in names)
    metrics = {**metrics, "sparsity": zeros / sum(saved[name].numel() for name in names)}
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
    rows = {}
    for record in records:
        values = asdict(record)
        sweep = values.pop("sweep")
        row = rows.setdefault(record.name, {**values, "shape": "x".join(map(str, record.shape))})
        if sweep > 0:
            row["sparsity"] = record.sparsity
            row |= {f"{loss}_{sweep + 1}": values[loss] for loss in ("loss_before", "loss_after")}
            for effort in ("newton_steps", "cg_iterations", "products", "seconds"):
                row[effort] += values[effort]
            row["peak_memory_bytes"] = max(row["peak_memory_bytes"], record.peak_memory_bytes)
    return list(rows.values())


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV; the columns are those of any row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def load(folder: str | Path, model: nn.Module) -> tuple[nn.Module, Masks]:
    """Load a run folder's weights into `model`, a network of the same architecture; returns it and the masks.

    Raises:
        SnowsError: a file is missing or damaged, or the weights do not fit the model.
    """
    folder = Path(folder)
    try:
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return model, safetensors.torch.load_file(folder / "masks.safetensors")
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise SnowsError(f"cannot load {folder}: {error}") from error


class Progress:
    """A bar over the layers, and a line for each that is finished."""

    def __init__(self, name: str):
        self.bar = tqdm(desc=name, unit="layer", dynamic_ncols=True, file=sys.stdout, disable=not sys.stdout.isatty())

    def __call__(self, layer: LayerRecord, layers: int) -> None:
        line = f"  {layer.name:<28} {layer.sparsity:6.1%} zero"
        if layer.products:
            line += f"   loss {layer.loss_before:9.3g} -> {layer.loss_after:9.3g}"
            line += f"   {layer.newton_steps} steps, {layer.cg_iterations:3d} CG iterations, {layer.seconds:6.1f} s"
        tqdm.write(line, file=sys.stdout)
        self.bar.total = layers
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def percent(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{accuracy:.2f} %"


def kinds(names: Iterable[str]) -> str:
    """Layer names, those that differ in numbers alone put together: "blocks.*.mlp.fc1 (12), head"."""
    counts = Counter(re.sub(r"\d+(?=.*\.)", "*", name) for name in names)
    return ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items())


def summary(metrics: dict) -> str:
    """The closing table: dense, masked only, pruned; time; what was left dense."""
    rows = [("dense", "dense_accuracy", "dense_sparsity"), ("masked only", "masked_accuracy", "sparsity")]
    if metrics["algo"] != "MP":
        rows.append((metrics["algo"], "accuracy", "sparsity"))
    lines = ["", f"  {'':<12} {'accuracy':>12} {'zeros':>9}"]
    lines += [f"  {name:<12} {percent(metrics[acc]):>12} {metrics[zeros]:9.2%}" for name, acc, zeros in rows]
    lines += ["", f"  {metrics['seconds']:.0f} s, {metrics['curvature_products']:.0f} curvature products"]
    if metrics["left_dense"]:
        reasons = {reason: [] for reason in metrics["left_dense"].values()}
        for name, reason in metrics["left_dense"].items():
            reasons[reason].append(name)
        lines += ["  left dense:", *(f"    {kinds(names)}: {reason}" for reason, names in reasons.items())]
    return "\n".join(lines)
