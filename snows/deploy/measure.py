"""How long networks take on the runtimes that are installed, in turn, and what their zeros did there."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from snows.deploy.backends import BACKENDS, Backend, Run, Subject, eager
from snows.errors import SnowsError, first_line
from snows.network.known import weight_name
from snows.network.layers import Masks

DENSE, PRUNED = "dense", "pruned"
ALIKE = 0.1  # share of a time by which two runs of one network may differ on a machine that does other things too


@dataclass
class Measured:
    """One network on one backend: milliseconds of a forward pass, or why there are none."""

    backend: str
    network: str
    wall_ms: float | None = None  # the least of all runs, as cpu_ms
    cpu_ms: float | None = None  # of all threads
    median_wall_ms: float | None = None
    median_cpu_ms: float | None = None
    difference: float | None = None  # largest, of the logits from torch's, as a share of the largest logit
    problem: str = ""


def measure(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    backends: Mapping[str, Backend] = BACKENDS,
    threads: int = 1,
    runs: int = 20,
) -> Iterator[Measured]:
    """What each network takes on each backend that is installed; they run in turn, so that a busy spell hits all.

    A network that a backend cannot run, or would run as torch does, has a `problem` there.
    """
    subjects = {name: Subject(network.eval().requires_grad_(False), images) for name, network in networks.items()}
    with torch_threads(threads):
        logits = {name: eager(subject, threads)() for name, subject in subjects.items()}
        for name, backend in backends.items():
            if not backend.missing:
                yield from on_backend(name, backend, subjects, logits, (threads, runs))


def on_backend(
    name: str, backend: Backend, subjects: Mapping[str, Subject], logits: Mapping[str, Tensor], how: tuple[int, int]
) -> list[Measured]:
    """The rows of one backend; how: (threads, runs)."""
    threads, runs = how
    calls: dict[str, Run] = {}
    rows = {each: Measured(name, each) for each in subjects}
    for each, subject in subjects.items():
        try:
            call = backend.build(subject, threads)
            if call is None:
                rows[each].problem = "no layer has zeros that it could skip"
                continue
            found, expected = torch.as_tensor(call()), logits[each]
            rows[each].difference = largest(found - expected) / (largest(expected) or 1.0)
            calls[each] = call
        except Exception as error:  # each runtime raises its own of what it cannot run
            kind = "" if isinstance(error, SnowsError) else f"{type(error).__name__}: "
            rows[each].problem = kind + first_line(error)
    for each, (wall, cpu) in in_turn(calls, runs).items():
        rows[each].wall_ms, rows[each].median_wall_ms = min(wall), median(wall)
        rows[each].cpu_ms, rows[each].median_cpu_ms = min(cpu), median(cpu)
    return list(rows.values())


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def in_turn(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of each call, every one once a round: (on the clock, of the process's threads)."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for call in calls.values():
        call()  # what is set up or allocated by the first passes
    for _ in range(runs):
        for name, call in calls.items():
            began = time.perf_counter(), time.process_time()
            call()
            ended = time.perf_counter(), time.process_time()
            for kept, start, end in zip(times[name], began, ended):
                kept.append(1000 * (end - start))
    return times


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch with so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refilled(model: nn.Module, masks: Masks) -> nn.Module:
    """The network as it was before it was pruned, as far as time goes: random numbers where its masks have zeros."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = parameters[weight_name(name, parameters)]
        scale = weight[mask].std().nan_to_num(0.0) if mask.any() else torch.tensor(1e-2)
        noise = scale * torch.randn(weight.shape, generator=generator)
        weight.data = weight.data.where(mask, noise.to(weight))
    return model


def sentence(rows: Sequence[Measured]) -> str:
    """What zeros did to the time on each backend: pruned beside dense, by the CPU's time."""
    times = {(row.backend, row.network): row.cpu_ms for row in rows if row.cpu_ms is not None}
    told: dict[str, list[str]] = {"faster": [], "slower": [], "as fast": []}
    for backend in dict.fromkeys(row.backend for row in rows):
        pruned, dense = times.get((backend, PRUNED)), times.get((backend, DENSE), times.get(("torch", DENSE)))
        if pruned is None or dense is None:
            continue
        beside = "" if (backend, DENSE) in times else " of torch"
        change = f"{backend} ({pruned:.3g} ms, dense {dense:.3g}{beside})"
        ratio = pruned / dense
        told["faster" if ratio < 1 - ALIKE else "slower" if ratio > 1 + ALIKE else "as fast"].append(change)
    parts = [f"{what} on {', '.join(found)}" for what, found in told.items() if found]
    if not parts:
        return "Nothing was measured of dense and pruned together."
    return f"The pruned network is {'; '.join(parts)}. A difference below {ALIKE:.0%} counts as none."


def as_rows(rows: Sequence[Measured]) -> list[dict]:
    return [asdict(row) for row in rows]
