"""Which depths of a layer's window, and which layers, the images give enough samples of to be fitted."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from snows.calibration.plan import Plan
from snows.errors import listed
from snows.network.layers import Layer, Masks
from snows.network.window import Window
from snows.options import Options

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


class Samples:
    """How many numbers so many images give of each depth, beside the weights that they are to determine."""

    def __init__(self, plan: Plan, images: int):
        self.plan, self.images = plan, images
        self.depths: dict[tuple[str, int], list[int]] = {}  # of windows, by layer and K, that have been asked for

    def counted(self, layer: Layer, mask: Tensor, options: Options) -> list[bool]:
        """Which depths of a layer's window the images give enough samples of, for the weights that survive.

        One of few samples, such as the logits, is fitted by heart: a classifier learns from it that classes which the
        images do not show are never the answer. Images that are held out do not tell: the logits' errors shrink. Nor do
        mixtures count, which show no classes of their own.
        """
        needed = options.min_samples * int(mask.sum()) * (1 + options.mixtures)
        return [numbers * self.images >= needed for numbers in self._numbers(layer, options.k_step)]

    def _numbers(self, layer: Layer, k_step: int) -> list[int]:
        """How many numbers an image has at each depth of a layer's window."""
        place = layer.name, k_step
        if place not in self.depths:
            features = Window(self.plan.network, [layer], k_step).features
            self.depths[place] = [self.plan.numbers(node) for node in features]
        return self.depths[place]

    def solvable(self, layer: Layer, mask: Tensor, options: Options) -> Tensor:
        """What is solved of a weight: its support; nothing where the layer's own outputs are few, as a classifier's."""
        return mask if self.counted(layer, mask, options)[0] else torch.zeros_like(mask)

    def tell_of_few(self, masks: Masks, options: Options) -> None:
        """Name the layers that the images give too few samples of; warn where these are all."""
        layers = [layer for layer in self.plan.network.layers if layer.name in masks]
        few = [layer.name for layer in layers if not self.counted(layer, masks[layer.name], options)[0]]
        if few:
            log.log(
                logging.WARNING if len(few) == len(layers) else logging.INFO,
                "of %d layer%s the images give fewer than %g numbers per surviving weight (`min_samples`): no weights "
                "are solved there, biases at most: %s", len(few), "s"[: len(few) > 1], options.min_samples, listed(few),
            )  # fmt: skip
