"""More images of the same ones: beside each, mixtures of it with others, without labels (mixup, arXiv 1710.09412).

What the dense network makes of a mixture is known as well as what it makes of an image, and a mixture shows a network
what none of the images does. What is fitted to few images is fitted less by heart with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snows.calibration.store import room_for

LEAST_SHARE = 0.3  # of either image in a mixture


def with_mixtures(images: Tensor, copies: int, block: int, seed: int, cache_dir: str = "") -> Tensor:
    """Each image with `copies` mixtures behind it, of it and another one: ((1 + copies) n, channels, height, width).

    block: so many images in a row are mixed with one another alone, so that mini-batches of them that are held out do
        not show what the others are fitted to. An image that is alone in its block is its own mixture.
    cache_dir: the folder for images of more than a GiB; see snows/calibration/store.py.
    """
    generator, each = torch.Generator().manual_seed(seed), 1 + copies
    result = room_for(torch.Size((each * len(images), *images.shape[1:])), images.dtype, cache_dir)
    for some, room in zip(images.split(block), result.split(each * block), strict=True):
        own = room.unflatten(0, (len(some), each))  # (n, 1 + copies, channels, height, width)
        own[:, 0] = some
        for copy in range(1, each):
            order = torch.randperm(len(some), generator=generator, device="cpu")
            other = torch.empty_like(order).scatter_(0, order, order.roll(1))  # the one before it in the order
            drawn = torch.rand(len(some), 1, 1, 1, generator=generator, device="cpu", dtype=torch.float32)
            share = drawn * (1 - 2 * LEAST_SHARE) + LEAST_SHARE
            own[:, copy] = torch.lerp(some[other], some, share.to(some.dtype))
    return result
