"""The K-step loss of a layer, or of many at once, and the variables that it is minimised over.

    L(theta) = sum_k c_k || Y_k - f_k(X; theta) ||^2                               (the paper's K-step objective)

with f_k the features after the k-th counted operation from the first layer on, Y_k those of the dense network, and one
coefficient c_k per depth. Layer by layer the window ends after K operations; of all layers at once it is the rest of
the network, the logits among its features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from snows.calibration.examples import Examples
from snows.calibration.stream import Stream
from snows.network.layers import Layer
from snows.network.trace import Values
from snows.network.window import Window
from snows.options import Options


class Variables:
    """What is solved for: the layers' weights and the updates of their biases, as one vector theta.

    A layer's part of theta are its weight's rows; with `biases`, where a bias after the layer can take it up, with one
    more column, the update of each output's bias.
    """

    def __init__(self, layers: Sequence[Layer], biases: bool):
        self.layers = layers
        self.with_bias = [biases and layer.bias is not None for layer in layers]
        self.shapes = [
            torch.Size((layer.shape[0], layer.shape[1:].numel() + 1)) if with_bias else layer.shape
            for layer, with_bias in zip(layers, self.with_bias)
        ]

    def pack(self, weights: Sequence[Tensor], bias_update: float | bool = 0.0) -> Tensor:
        """theta of all the layers' weights (or masks), with one value for all the bias updates."""
        rows = []
        for weight, with_bias in zip(weights, self.with_bias, strict=True):
            if with_bias:
                column = torch.full_like(weight.flatten(1)[:, :1], bias_update)  # (out, 1)
                weight = torch.cat([weight.flatten(1), column], dim=1)  # (out, in + 1)
            rows.append(weight.flatten())
        return torch.cat(rows)  # (theta,)

    def rows(self, theta: Tensor) -> list[Tensor]:
        """Each layer's part of theta: (out, in + 1) with its bias updates in the last column, or as its weight."""
        parts = theta.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def unpack(self, theta: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """(weights, bias updates (out,) or None) of the layers, in order."""
        weights, updates = [], []
        for rows, layer, with_bias in zip(self.rows(theta), self.layers, self.with_bias):
            weights.append(rows[:, :-1].reshape(layer.shape) if with_bias else rows)
            updates.append(rows[:, -1] if with_bias else None)
        return weights, updates


class Objective:
    """L(theta) over micro-batches; see the module's docstring.

    options: `depth_weights`: "mean" gives c_k = 1 / numel(Y_k), "relative" gives c_k = 1 / ||Y_k||^2, or 0 where that
        is next to nothing, both over all the images; and of the rest what says how to differentiate: `curvature`,
        `curvature_images`, `biases`.
    kept_bytes: what the graphs of micro-batches may take to be kept; None: half of what is free.
    indices: the micro-batches that the loss is of; None: all.
    counted: for each depth, whether it counts (c_k is 0 where not); with None, or where none does, all count.
    """

    def __init__(
        self,
        examples: Examples,
        options: Options,
        kept_bytes: int | None = None,
        indices: list[int] | None = None,
        counted: list[bool] | None = None,
    ):
        self.counted = counted if counted and any(counted) else [True] * len(examples.window.features)
        self.examples, self.window, self.options = examples, examples.window, options
        self.device, self.kept_bytes = examples.sparse.device, kept_bytes
        self.indices = list(range(len(examples.sizes))) if indices is None else indices
        self.group = examples.sparse.group
        self.variables = Variables(self.window.layers, options.biases)
        self.coefficients = self._coefficients()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def images(self) -> int:
        return sum(self.examples.sizes[i] for i in self.indices)

    def mini_batches(self) -> list[Objective]:
        """The loss of each mini-batch alone (for one Newton step per mini-batch)."""
        return [self.on(group) for group in self.examples.groups]

    def on(self, indices: list[int]) -> Objective:
        """The loss of some of the micro-batches alone, with coefficients of their own."""
        return Objective(self.examples, self.options, self.kept_bytes, indices, self.counted)

    def sample(self, images: int) -> list[int]:
        """Micro-batches of about so many images, at least one, spread over the calibration set; 0: all of them."""
        count = min(len(self), math.ceil(len(self) * (images or self.images) / self.images))
        return [self.indices[i * len(self) // count] for i in range(count)]

    def own(self, indices: list[int]) -> list[int]:
        """The micro-batches of which this process has images."""
        return [i for i in indices if i in self.examples.sparse.own]

    def inputs(self, index: int) -> Values:
        """What the window reads for micro-batch `index`, on the device."""
        return self.examples.inputs(index)

    def targets(self, index: int) -> list[Tensor]:
        """Y_0 .. Y_K of micro-batch `index`, on the device."""
        return self.examples.targets(index)

    def features(self, values: Values, theta: Tensor) -> list[Tensor]:
        """f_0 .. f_K of one micro-batch."""
        return self.window(values, *self.variables.unpack(theta))

    def feature_loss(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """sum_k c_k || Y_k - f_k ||^2, a float64 scalar (differentiable)."""
        parts = (mse_loss(f, y, reduction="sum").double() * c for f, y, c in zip(features, targets, self.coefficients))
        return sum(parts)

    @torch.no_grad()
    def loss(self, theta: Tensor) -> Tensor:
        """L(theta), a float64 scalar on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in self.own(self.indices):
            total += self.feature_loss(self.features(self.inputs(i), theta), self.targets(i))
        return self.group.sum(total)

    def _coefficients(self) -> list[float]:
        """c_0 .. c_K."""
        sizes = self.examples.numbers() if self.options.depth_weights == "mean" else self.examples.energies()
        totals = [sum(depth) for depth in zip(*sizes[self.indices].tolist())]
        return [1 / total if total > 0 and counts else 0.0 for total, counts in zip(totals, self.counted)]


def reconstruction(
    layers: Sequence[Layer],
    sparse: Stream,
    dense: Stream,
    options: Options,
    kept_bytes: int | None = None,
    groups: list[list[int]] | None = None,
    counted: list[bool] | None = None,
) -> Objective:
    """The objective of the layers from the first on, at which the streams stand.

    options: besides what `Objective` takes, `k_step` and `targets`: "dense" takes the dense network's own features, so
        that the layers also repair what those before them broke; "same" runs the dense network on the pruned network's
        current features (the paper's choice).
    groups: the micro-batches of each mini-batch; None: each is one.
    counted: as `Objective` takes it.

    The targets of many layers are not held, but computed when they are asked for: they would be features of them all.
    """
    window = Window(sparse.network, layers, options.k_step, sparse.model)
    teacher = Window(dense.network, layers, options.k_step, dense.model)
    dense_weights = [dense.model.get_parameter(layer.parameter) for layer in layers]

    def teach(values: Values) -> list[Tensor]:
        return teacher(teacher.enter(values), dense_weights)

    source = dense if options.targets == "dense" else sparse
    examples = Examples(window, sparse, source, teach, hold=len(layers) == 1, groups=groups or [])
    return Objective(examples, options, kept_bytes, counted=counted)
