"""The calibration images as they are given: checked, and in the mini-batches that a job passes over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from snows.calibration.faithful import check_trace
from snows.calibration.mixtures import with_mixtures
from snows.errors import UsageError, listed
from snows.network.network import Network
from snows.options import Options

CHECKED = 8  # images that the traced network is compared with the model on


def mini_batches(network: Network, calibration: Tensor | Iterable, options: Options) -> list[Tensor]:
    """The calibration images in mini-batches, the last one short, once they are known to run through the network.

    options: `mixtures` of them go with them; the windows of `k_step` are checked too, and `network` refuses layers
        whose windows do not hold.
    """
    dtype = next(network.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"the model's weights are {dtype}, too coarse to solve in: pass model.float().")
    images = gather(calibration).to(dtype)
    if options.mixtures:
        images = with_mixtures(images, options.mixtures, options.seed, options.cache_dir)
    batches = list(images.split(options.batch_size))
    check_trace(network, batches[0][:CHECKED].to(next(network.model.parameters()).device), options.k_step)
    return batches


def gather(calibration: Tensor | Iterable) -> Tensor:
    """All calibration images as one tensor (n, channels, height, width) on the host."""
    if calibration is None:
        raise UsageError(
            "calibration images are needed by all but magnitude masks whose surviving weights stay as they are."
        )
    if not isinstance(calibration, Tensor):
        if not isinstance(calibration, Iterable):
            raise UsageError(f"calibration must be a tensor or batches of images, not {type(calibration).__name__}.")
        batches = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in calibration]
        if not batches:
            raise UsageError("there are no calibration images: the batches are empty.")
        if not all(isinstance(batch, Tensor) and batch.ndim == 4 for batch in batches):
            raise UsageError(
                "calibration must be a tensor, or batches of images (n, c, h, w), alone or first in a tuple."
            )
        sizes = {tuple(batch.shape[1:]) for batch in batches}
        if len(sizes) > 1:
            raise UsageError(f"calibration images must be of one size, not of {listed(sorted(map(str, sizes)))}.")
        calibration = torch.cat([batch.cpu() for batch in batches])
    if calibration.ndim != 4 or len(calibration) == 0:
        raise UsageError(f"calibration images must have shape (n, c, h, w), not {tuple(calibration.shape)}.")
    if not calibration.is_floating_point():
        raise UsageError(
            f"calibration images must be numbers as the model wants them (float, normalised), not {calibration.dtype}."
        )
    # A few at a time: to ask takes as much memory again.
    finite = torch.cat([part.isfinite().flatten(1).all(1) for part in calibration.split(64)])
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise UsageError(f"{len(bad)} calibration images hold NaN or infinity (the first is number {bad[0]}).")
    calibration = calibration.detach().cpu()
    return calibration.clone() if calibration.is_inference() else calibration
