"""Top-1 accuracy, counted over images (never averaged over batches)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from snows.errors import SnowsError


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Percent of the images that `model` classifies correctly, in evaluation mode.

    Raises:
        SnowsError: no images, a label that the model has no class for, or too little memory.
    """
    training = model.training
    model.eval().to(device)
    correct = total = 0
    for images, labels in batches:
        try:
            logits = model(images.to(device))
        except torch.OutOfMemoryError as error:
            raise SnowsError(f"out of memory with {len(images)} test images: lower --test_batch_size.") from error
        if labels.max() >= logits.shape[1]:
            raise SnowsError(f"the data has a label {labels.max()} but the model only {logits.shape[1]} classes.")
        correct += (logits.argmax(1) == labels.to(device)).sum()
        total += len(labels)
    model.train(training)
    if total == 0:
        raise SnowsError("there are no test images.")
    return 100 * int(correct) / total
