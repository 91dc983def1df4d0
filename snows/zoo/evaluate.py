"""Top-1 accuracy, counted over images (never averaged over batches)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snows.errors import SnowsError
from snows.memory import is_gpu, is_out_of_memory

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

IMAGE_BYTES = 16 * 2**20  # on the host, of images that pass through a network at a time: features are many times these


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Percent of the images that `model` classifies correctly, in evaluation mode.

    A batch passes in parts, where it is large or the memory does not hold its features.

    Raises:
        SnowsError: no images, a label that the model has no class for, or too little memory for a single image.
    """
    training = model.training
    model.eval().to(device)
    correct = total = 0
    most = sys.maxsize  # images at a time
    for images, labels in batches:
        if not is_gpu(device):
            most = min(most, max(1, IMAGE_BYTES // images[0].nbytes))
        start = 0
        while start < len(images):
            part = slice(start, start + most)
            try:
                correct += count_correct(model, images[part].to(device), labels[part].to(device))
                start += most
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                most = halved(len(images[part]))
        total += len(labels)
    model.train(training)
    if total == 0:
        raise SnowsError("there are no test images.")
    return 100 * correct / total


def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many of the images the model classifies correctly."""
    logits = model(images)
    if labels.max() >= logits.shape[1]:
        raise SnowsError(f"the data has a label {labels.max()} but the model only {logits.shape[1]} classes.")
    return int((logits.argmax(1) == labels).sum())


def halved(images: int) -> int:
    """How many images to try at a time, where so many were too many."""
    if images == 1:
        raise SnowsError("out of memory with one test image at a time: load fewer beside it (`test_batch_size`).")
    log.warning("out of memory with %d test images at a time: going on with %d", images, (images + 1) // 2)
    return (images + 1) // 2
