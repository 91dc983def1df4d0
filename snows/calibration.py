"""The calibration images: checked, in micro-batches, on their way through the pruned and through the dense network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from snows.errors import TraceError, Unsolvable, UsageError, first_line
from snows.graph import Layer, Network, Stream
from snows.layer_rules import listed
from snows.memory import is_out_of_memory

T = TypeVar("T")
log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


class Streams:
    """The calibration images on their way through the pruned and the dense network, cut again when memory runs out."""

    def __init__(self, network: Network, batches: list[Tensor], device: torch.device | str):
        self.network, self.batches, self.device = network, batches, device
        self.dense_model = copy.deepcopy(network.model)
        self.restart()

    def restart(self) -> None:
        """Both streams at the start of the line, for a new sweep."""
        models = (self.network.model, self.dense_model)
        self.sparse, self.dense = (Stream(self.network, model, self.batches, self.device) for model in models)

    def advance(self, layer: Layer, targets: str = "dense") -> None:
        """The pruned network's stream up to a layer; the dense network's too where its features are the targets."""
        self.sparse.advance(layer.node)
        if targets == "dense":
            self.dense.advance(layer.node)

    @property
    def batch_size(self) -> int:
        """Images in the largest micro-batch."""
        return max(len(batch) for batch in self.batches)

    def halve(self) -> None:
        """Cut every micro-batch in two and start again."""
        half = (self.batch_size + 1) // 2
        self.batches = [part for batch in self.batches for part in batch.split(half)]
        self.restart()

    def shrink(self, batch_size: int) -> None:
        """Cut the micro-batches as running out of memory once cut them."""
        while self.batch_size > batch_size:
            self.halve()


def fitting(
    streams: Streams, place: str, work: Callable[[], T], advice: str = "lower --k_step or raise --memory_budget"
) -> T:
    """The result of `work`, done again with micro-batches of half the size as long as they need too much memory.

    Raises:
        Unsolvable: single images do not fit either; the message ends in the advice.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if streams.batch_size == 1:
                streams.restart()  # they may have stopped half way
                raise Unsolvable(
                    f"out of memory at {place} with one image at a time: {advice}.",
                    f"out of memory with one image at a time: {advice}",
                ) from error
            streams.halve()
            log.warning("out of memory at %s: going on with micro-batches of %d images", place, streams.batch_size)


def micro_batches(network: Network, calibration: Tensor | Iterable, batch_size: int) -> list[Tensor]:
    """The calibration images in micro-batches, the last one short, once they are known to run through the line."""
    dtype = next(network.model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"the model's weights are {dtype}, too coarse to solve in: pass model.float().")
    images = gather(calibration).to(dtype)
    batches = list(images.split(min(batch_size, len(images))))
    check(network, batches[0].to(next(network.model.parameters()).device))
    return batches


def gather(calibration: Tensor | Iterable) -> Tensor:
    """All calibration images as one tensor (n, channels, height, width) on the host."""
    if calibration is None:
        raise UsageError("calibration images are needed by all but magnitude masks whose survivors stay as they are.")
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
    if not torch.isfinite(calibration).all():
        bad = (~torch.isfinite(calibration)).flatten(1).any(1).nonzero().flatten().tolist()
        raise UsageError(f"{len(bad)} calibration images hold NaN or infinity (the first is number {bad[0]}).")
    return calibration.detach().cpu()


@torch.no_grad()
def check(network: Network, images: Tensor) -> None:
    """Run the line once and compare it with the model itself: a trace must not have frozen a data-dependent choice.

    Raises:
        UsageError: the images do not run through the model. TraceError: the line computes something else.
    """
    try:
        own = as_it_came(network, images)
    except Exception as error:  # whatever the model raises of images that are not its own
        shape = "x".join(map(str, images.shape[1:]))
        raise UsageError(f"calibration images of {shape} do not run through the model: {first_line(error)}") from error
    line = Stream(network, network.model, [images], images.device)
    line.advance(network.nodes[-1])
    tolerance = 1e-3 * own.nan_to_num(0, 0, 0).abs().max().item()
    if not torch.allclose(line[0][network.output], own, rtol=1e-3, atol=tolerance, equal_nan=True):
        raise TraceError(
            "the traced model computes something else than the model: its forward pass depends on data, or writes into "
            "a view of a value that it reads again."
        )


def as_it_came(network: Network, images: Tensor) -> Tensor:
    """The logits of the model with its in-place modules as they were before the trace."""
    for module in network.in_place:
        module.inplace = True
    try:
        return network.model(images.clone())
    finally:
        for module in network.in_place:
            module.inplace = False
