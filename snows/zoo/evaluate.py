"""What a network says of test images: its accuracy, counted over images, and how far it is from the dense network."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snows.distributed import ALONE, Group
from snows.errors import SnowsError, UsageError
from snows.memory import is_gpu, is_out_of_memory
from snows.network.logits import logits_of

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

IMAGE_BYTES = 16 * 2**20  # on the host, of images that pass through a network at a time: features are many times these
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Score:
    """How a network does on test images, alone and beside the dense one; None is what was not measured."""

    accuracy: float | None = None  # percent, top-1; None: no image has a label
    agreement: float | None = None  # percent of the images to which it gives the dense network's class
    logit_error: float | None = None  # squared error of the logits, as a share of the square of the dense network's


def accuracy(model: nn.Module, batches: Batches, device: torch.device | str = "cpu") -> float | None:
    """Percent of the images that `model` classifies correctly, in evaluation mode; None: there are no labels.

    A batch passes in parts, where it is large or the memory does not hold its features.

    Raises:
        UsageError: a label that the model has no class for. SnowsError: no images, or too little memory for one.
    """
    return score(model, batches, device)[0].accuracy


def score(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    dense: Tensor | None = None,
    group: Group = ALONE,
) -> tuple[Score, Tensor]:
    """(how `model` does, its logits on the host); see `accuracy`.

    dense: the dense network's logits on the same images.
    group: the processes that share the images: the score is of all of theirs, the logits are of this one's.
    """
    training = model.training
    parts = list(outputs(model.eval().to(device), batches, device))
    model.train(training)
    if not parts:
        raise SnowsError("there are no test images.")
    logits, labels = (torch.cat(each) for each in zip(*parts))  # (n, classes), (n,)
    chosen, known = logits.argmax(1), labels >= 0
    right = percent(chosen[known] == labels[known], group)
    if dense is None:
        return Score(right), logits
    squares = [part.double().square().sum() for part in (logits - dense, dense)]
    error, size = group.sum(torch.stack(squares))
    relative = (error / size).item()
    agreement = percent(chosen == dense.argmax(1), group)
    return Score(right, agreement, relative if math.isfinite(relative) else None), logits


def percent(which: Tensor, group: Group) -> float | None:
    """Percent of what is true, in all the processes; None of nothing."""
    true, total = group.sum(torch.tensor([int(which.sum()), len(which)], device="cpu")).tolist()
    return 100 * true / total if total else None


@torch.no_grad()
def outputs(model: nn.Module, batches: Batches, device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's logits and the labels of all images, on the host, in parts that the memory holds."""
    most = sys.maxsize  # images at a time
    for images, labels in batches:
        if not is_gpu(device):
            most = min(most, at_a_time(images[0]))
        start = 0
        while start < len(images):
            part = slice(start, start + most)
            try:
                logits = logits_of(model(images[part].to(device))).cpu()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                most = halved(len(images[part]))
                continue
            if labels[part].max() >= logits.shape[1]:
                highest = labels[part].max()
                raise UsageError(f"the data has a label {highest} but the model only {logits.shape[1]} classes.")
            yield logits, labels[part]
            start += most


def at_a_time(image: Tensor) -> int:
    """How many images pass through a network on the host at a time."""
    return max(1, IMAGE_BYTES // image.nbytes)


def halved(images: int) -> int:
    """How many images to try at a time, where so many were too many."""
    if images == 1:
        raise SnowsError("out of memory with one test image at a time: load fewer beside it (`test_batch_size`).")
    log.warning("out of memory with %d test images at a time: going on with %d", images, (images + 1) // 2)
    return (images + 1) // 2
