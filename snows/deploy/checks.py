"""Whether an exported file still is the pruned network: read back, and compared on images and weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snows.deploy.deployable import Deployable, reading_images
from snows.distributed import ALONE
from snows.errors import SnowsError, listed
from snows.zoo.evaluate import outputs, percent

FOUND = 0.5  # how unlike a layer's weight one in a file must be to be another's: those of other layers are about 1
ZSTD_LEVEL = 10


@dataclass(frozen=True)
class ReadBack:
    """A file as its runtime reads it: what gives the logits of images, and each linear map's name and weight.

    Weights are (out, in, ...), the axis that the runtime sums over the second, whatever way they lie in the file.
    """

    run: Callable[[Tensor], Tensor]
    weights: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Check:
    """What was found in an export, beside the pruned network in PyTorch."""

    largest_difference: float  # of a logit
    largest_logit: float  # of the network in PyTorch, to compare that with
    same_class: int  # of the images
    images: int
    accuracy: float | None  # percent, of the file; None: no image has a label
    accuracy_before: float | None  # percent, of the network in PyTorch
    zeros_asked: int  # of the weights of the pruned layers
    zeros_found: int  # of these, in the file
    layers: int  # that are pruned
    nm_layers: int | None  # of these, with the pattern along the axis that is summed over; None: unstructured
    bytes: int
    zstd_bytes: int | None  # None: zstandard is not installed


class Logits:
    """The logits and labels of a network on the test images of what is deployed, computed once."""

    def __init__(self, run: Callable[[Tensor], Tensor], deployable: Deployable):
        with reading_images():
            parts = list(outputs(run, deployable.test(), "cpu"))
        if not parts:
            raise SnowsError("there are no test images to check an export on.")
        self.values, self.labels = (torch.cat(each) for each in zip(*parts))  # (n, classes), (n,)

    @property
    def accuracy(self) -> float | None:
        """Percent of the images with a label that have the right class."""
        known = self.labels >= 0
        return percent(self.values.argmax(1)[known] == self.labels[known], ALONE)


def check(
    deployable: Deployable, before: Logits, read: ReadBack, weights: dict[str, Tensor], files: list[Path]
) -> Check:
    """What there is to say of an export.

    before: of the network in PyTorch. weights: of the pruned layers, as they were written.

    Raises:
        SnowsError: zeros or the pattern of a layer are lost, or the layer is not in the file.
    """
    after = Logits(read.run, deployable)
    found = matched(weights, read.weights)
    missing = [name for name in weights if name not in found]
    if missing:
        raise SnowsError(f"no linear map or convolution in the file has the weights of {listed(missing)}.")
    kept = {name: found[name][weight == 0] == 0 for name, weight in weights.items()}
    lost = [f"{name} ({int((~zeros).sum())} of {len(zeros)})" for name, zeros in kept.items() if not zeros.all()]
    if lost:
        raise SnowsError(f"zeros are lost in {listed(lost)}.")
    masked = [name for name, mask in deployable.masks.items() if not mask.all()]
    ruled = {name: deployable.pattern.of(name) for name in masked} if deployable.pattern else {}
    broken = [name for name, rule in ruled.items() if rule is None or not rule.holds(found[name] != 0)]
    if broken:
        raise SnowsError(f"{deployable.pattern} is lost along the axis that is summed over in {listed(broken)}.")
    return Check(
        largest_difference=(after.values - before.values).abs().max().item(),
        largest_logit=before.values.abs().max().item(),
        same_class=int((after.values.argmax(1) == before.values.argmax(1)).sum()),
        images=len(after.labels),
        accuracy=after.accuracy,
        accuracy_before=before.accuracy,
        zeros_asked=sum(map(len, kept.values())),
        zeros_found=sum(int(zeros.sum()) for zeros in kept.values()),
        layers=len(weights),
        nm_layers=len(ruled) if deployable.pattern else None,
        bytes=sum(file.stat().st_size for file in files),
        zstd_bytes=zstd_bytes(files),
    )


def matched(weights: dict[str, Tensor], found: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Each layer's weight as a file has it, found by its signs; layers that the file lacks are left out."""
    return {name: weight for name, (_, weight) in matches(weights, found).items()}


def matches(weights: dict[str, Tensor], found: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, Tensor]]:
    """Each layer's weight as a file has it, and what the file calls it; see `matched`."""
    left, result = list(found), {}
    for name, weight in weights.items():
        unlike = [difference(weight, each) for _, each in left]
        if min(unlike, default=FOUND) < FOUND:
            where, each = left.pop(unlike.index(min(unlike)))
            result[name] = where, each.reshape(weight.shape)
    return result


def difference(weight: Tensor, other: Tensor) -> float:
    """How unlike the signs of two weights are, by magnitude: 0, the same; 2, opposite; infinite, another shape.

    Runtimes scale rows and columns of weights for int8, which leaves signs and zeros.
    """
    if core(weight) != core(other):
        return float("inf")
    size = weight.abs().sum()
    alike = (weight * other.reshape(weight.shape).sign()).sum()
    return (1 - alike / size).item() if size > 0 else 0.0


def core(weight: Tensor) -> tuple[int, ...]:
    """A weight's shape without the ones at its end: a convolution of 1 x 1 may be a linear map elsewhere."""
    shape = list(weight.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def zstd_bytes(files: list[Path]) -> int | None:
    """What is left of files once zstandard has compressed them, each alone."""
    try:
        import zstandard
    except ImportError:
        return None
    return sum(len(zstandard.ZstdCompressor(ZSTD_LEVEL).compress(file.read_bytes())) for file in files)
