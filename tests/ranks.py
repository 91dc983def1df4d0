"""Jobs in several processes, for tests: what runs in each of them, and how they are started."""

import multiprocessing
import os
import signal
import sys
import tempfile
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers import TinyCNN, randomise

import snows
from snows import verdicts
from snows.options import PRESETS
from snows.solve.curvature import Curvature

IMAGES = 11  # in micro-batches of 4, so that three processes have unequal shares, and of the last none at all
PAPER = {**PRESETS["paper"], "max_CG_iterations": 4}  # with many more, plain CG multiplies any rounding by millions
# name -> (pattern, masks, method, options)
CASES = {
    "best": (snows.NM(1, 2), "MP", "SNOWS", {}),
    "samples": (snows.Unstructured(0.5), "OBS", "SNOWS", {"w_warm": True, "joint_images": 4, "curvature_images": 4}),
    "paper": (snows.NM(1, 2), "Wanda", "SNOWS", PAPER),
    "least squares": (snows.Unstructured(0.5), "Wanda", "MP+", {}),
    "SparseGPT": (snows.NM(1, 2), "SparseGPT", "SparseGPT", {}),
    "masks alone": (snows.Unstructured(0.5), "OBS", "MP", {}),
}


def images(dtype=torch.float64):
    return torch.randn(IMAGES, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def prune(name, dtype=torch.float64, calibration=None, **hooks):
    """One of the cases."""
    pattern, mask_alg, algo, options = CASES[name]
    options = snows.Options(**{"batch_size": 4, "seed": 3, **options})
    calibration = images(dtype) if calibration is None else calibration
    model = randomise(TinyCNN()).to(dtype)
    return snows.prune(model, calibration, pattern, options, mask_alg=mask_alg, algo=algo, **hooks)


def each_case(names, dtype):
    return {name: prune(name, dtype) for name in names}


def given_other(what):
    """A job of which each process has something of its own."""
    rank, model, calibration, pattern, hooks = (
        dist.get_rank(),
        randomise(TinyCNN()).double(),
        images(),
        snows.NM(1, 2),
        {},
    )
    generator = torch.Generator().manual_seed(rank)
    match what:
        case "weights":
            model.fc.weight.data += rank
        case "statistics":  # as training in several processes may leave them
            next(buffer for buffer in model.buffers() if buffer.is_floating_point()).add_(rank)
        case "images":
            calibration[-1] += rank
        case "pattern":
            pattern = snows.NM(1 + rank, 2 + 2 * rank)
        case "layers":
            hooks["layers"] = lambda name: rank == 0 or name != "fc"
        case "masks":
            names = {name: weight.shape for name, weight in model.named_parameters() if weight.ndim > 1}
            pattern = {
                n.removesuffix(".weight"): torch.rand(shape, generator=generator) < 0.5 for n, shape in names.items()
            }
    return snows.prune(model, calibration, pattern, snows.Options(batch_size=4), **hooks)


def with_too_few_images():
    return prune("best", calibration=images()[:1])


def with_little_memory():
    """The second process cannot hold more than one image of a micro-batch while a layer is solved."""
    compute = Curvature.__init__

    def small(self, objective, theta):
        if dist.get_rank() == 1 and max(map(len, objective.examples.sparse.batches)) > 1:
            raise torch.OutOfMemoryError
        compute(self, objective, theta)

    Curvature.__init__ = small
    return prune("best")


def with_an_error_at(rank):
    """A listener that fails in one of the processes."""

    def listener(step, job):
        if dist.get_rank() == rank and len(job.layers) == 2:
            raise OSError("no space")

    return prune("best", listener=listener)


def killed_at(rank, layers):
    """The steps that were finished when a process was killed."""
    steps = []

    def listener(step, job):
        steps.append(step)
        if dist.get_rank() == rank and len(job.layers) == layers:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        prune("best", listener=listener)
    except verdicts.Lost as lost:
        return steps, str(lost)
    return steps, "nothing was lost"


def going_on(steps):
    return prune("best", finished=steps if dist.get_rank() == 0 else ())


class Raised(NamedTuple):
    """An error that a process ended with."""

    kind: type
    text: str
    layers: int  # that it had finished


def child(rank, number, folder, work, args):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), number, rank)
    try:
        result = work(*args)
    except snows.SnowsError as error:
        result = Raised(type(error), str(error), 0 if error.result is None else len(error.result.layers))
    torch.save(result, Path(folder) / f"{rank}.tmp")
    (Path(folder) / f"{rank}.tmp").rename(Path(folder) / f"{rank}.pt")
    os._exit(0)


def in_processes(number, work, *args):
    """What `work` gives back, or raises, in each process of a group; None of one that was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])  # once, from where its path does not lead yet
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=child, args=(i, number, folder, work, args)) for i in range(number)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            process.kill()
        files = [Path(folder) / f"{rank}.pt" for rank in range(number)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]
