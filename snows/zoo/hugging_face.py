"""Classifiers of the package transformers: by their names on the Hugging Face hub, or in folders that it wrote."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from re import fullmatch
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from snows.errors import UsageError, listed

PREFIX = "transformers:"  # of --arch


class Processed:
    """A transform, as a processor of transformers' makes a network's input of an image: PIL -> float32 (c, h, w).

    mean, std: in place of the processor's own, one number per channel each.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.mean: list[float] | None = None
        self.std: list[float] | None = None

    def __call__(self, image: Image) -> Tensor:
        changes = {}
        if self.mean is not None and self.std is not None:
            mean, std = ([float(each) for each in numbers] for numbers in (self.mean, self.std))
            changes = {"do_normalize": True, "image_mean": mean, "image_std": std}
        return self.processor(image, return_tensors="pt", **changes)["pixel_values"][0]


def check_place(place: str) -> None:
    """Refuse what transformers cannot look for.

    Raises:
        UsageError: it is not installed, or this is neither a folder nor the name of a repository.
    """
    if find_spec("transformers") is None:
        raise UsageError(f"{PREFIX}{place} needs the package transformers: pip install transformers.")
    if not place or not (Path(place).is_dir() or fullmatch(r"\w[\w.-]*/[\w.-]+", place)):
        raise UsageError(f"{PREFIX}{place}: give a folder that exists, or OWNER/NAME on the Hugging Face hub.")


def network_of(place: str, pretrained: bool, num_classes: int | None = None) -> nn.Module:
    """The classifier that a folder or a repository of the hub describes, in float32; none of their code is run.

    Raises:
        UsageError: its weights are those of no classifier. Whatever transformers raises.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    classes = {} if num_classes is None else {"num_labels": num_classes}
    config = AutoConfig.from_pretrained(place, **classes)
    if not pretrained:
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    model, told = AutoModelForImageClassification.from_pretrained(
        place, config=config, dtype=torch.float32, output_loading_info=True
    )
    if told["missing_keys"]:
        missing = listed(sorted(told["missing_keys"]))
        raise UsageError(
            f"the weights of {PREFIX}{place} lack {missing}, which would be random: take a network that was trained to "
            f"classify."
        )
    return model


def transform_of(place: str) -> Processed:
    """What the folder or the repository says of images. Raises whatever transformers raises."""
    from transformers import AutoImageProcessor

    return Processed(AutoImageProcessor.from_pretrained(place))
