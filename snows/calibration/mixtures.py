"""More images of the same ones: beside each, mixtures of it with others, without labels (mixup, arXiv 1710.09412).

What the dense network makes of a mixture is known as well as what it makes of an image, and a mixture shows a network
what none of the images does. What is fitted to few images is fitted less by heart with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snows.calibration.store import room_for

LEAST_SHARE = 0.3  # of either image in a mixture
AT_ONCE = 64  # images that are mixed at a time: of all of them, the others would take their memory once more


def with_mixtures(images: Tensor, copies: int, seed: int, cache_dir: str = "") -> Tensor:
    """Each image with `copies` mixtures behind it, of it and another one: ((1 + copies) n, channels, height, width).

    A single image is its own mixture. cache_dir: the folder for images of more than a GiB; see
    snows/calibration/store.py.
    """
    generator, each = torch.Generator().manual_seed(seed), 1 + copies
    result = room_for(torch.Size((each * len(images), *images.shape[1:])), images.dtype, cache_dir)
    own = result.unflatten(0, (len(images), each))  # (n, 1 + copies, channels, height, width)
    own[:, 0] = images
    for copy in range(1, each):
        order = torch.randperm(len(images), generator=generator, device="cpu")
        other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # the one before it in the order
        drawn = torch.rand(len(images), 1, 1, 1, generator=generator, device="cpu", dtype=torch.float32)
        share = (drawn * (1 - 2 * LEAST_SHARE) + LEAST_SHARE).to(images.dtype)
        for some in torch.arange(len(images), device="cpu").split(AT_ONCE):
            own[some, copy] = torch.lerp(images[other[some]], images[some], share[some])
    return result
