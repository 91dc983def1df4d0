"""The K-step reconstruction loss of one layer, its gradient and its curvature products.

    L(W) = sum_k c_k || Y_k - f_k(X; W) ||^2                                       (the paper's K-step objective)

with f_k the features after the k-th counted operation behind the layer, Y_k those of the dense network, and one
coefficient c_k per depth. Nothing here forms a curvature matrix: only its product with a vector, exact at any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import mse_loss

from snows.calibration.examples import Examples
from snows.calibration.stream import Stream
from snows.memory import free_memory, used_memory
from snows.network.layers import Layer
from snows.network.tangent import Tangents
from snows.network.trace import Values
from snows.network.window import Window
from snows.options import Options

Product = Callable[[Tensor], Tensor]
FirstOrder = Callable[[], tuple[Tensor, Tensor]]  # the loss and its gradient, when asked for


class Objective:
    """L(W) over micro-batches; see the module's docstring.

    The unknown is the weight; or, with `biases`, the rows of the weight with one more column, the shift of each output
    (out, in + 1), which the bias behind the layer takes up: see `join` and `split`.

    options: `depth_weights`: "mean" gives c_k = 1 / numel(Y_k), "relative" gives c_k = 1 / ||Y_k||^2, both over all the
        images; and of the rest what says how to differentiate: `curvature`, `curvature_images`, `biases`.
    kept_bytes: what the graphs of micro-batches may take to be kept; None: half of what is free.
    indices: the micro-batches that the loss is of; None: all.
    """

    def __init__(
        self,
        examples: Examples,
        options: Options,
        kept_bytes: int | None = None,
        indices: list[int] | None = None,
    ):
        self.examples, self.window, self.options = examples, examples.window, options
        self.device, self.kept_bytes = examples.sparse.device, kept_bytes
        self.indices = list(range(len(examples.sizes))) if indices is None else indices
        self.biases = options.biases and self.window.layer.bias is not None
        self.coefficients = self._coefficients()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def images(self) -> int:
        return sum(self.examples.sizes[i] for i in self.indices)

    def mini_batches(self) -> list[Objective]:
        """The same loss on each mini-batch alone (for one Newton step per mini-batch)."""
        return [self.on(group) for group in self.examples.groups]

    def on(self, indices: list[int]) -> Objective:
        """The same loss on some of the micro-batches alone, with coefficients of their own."""
        return Objective(self.examples, self.options, self.kept_bytes, indices)

    def sample(self, images: int) -> list[int]:
        """Micro-batches of about so many images, at least one, spread over the calibration set; 0: all of them."""
        count = min(len(self), math.ceil(len(self) * (images or self.images) / self.images))
        return [self.indices[i * len(self) // count] for i in range(count)]

    def join(self, weight: Tensor, shift: float | Tensor = 0.0) -> Tensor:
        """The unknown made of a weight (or a mask) and a shift per output."""
        return with_shift(weight, shift) if self.biases else weight

    def split(self, unknown: Tensor) -> tuple[Tensor, Tensor | None]:
        """(weight, shift (out,) or None)."""
        return without_shift(unknown, self.window.layer) if self.biases else (unknown, None)

    def features(self, values: Values, unknown: Tensor) -> list[Tensor]:
        """f_0 .. f_K of one micro-batch."""
        return self.window(values, *self.split(unknown))

    def _coefficients(self) -> list[float]:
        sizes = self.examples.numbers() if self.options.depth_weights == "mean" else self.examples.energies()
        totals = [sum(depth) for depth in zip(*sizes[self.indices].tolist())]
        return [1 / total if total > 0 else 0.0 for total in totals]

    def inputs(self, index: int) -> Values:
        """What the window reads for micro-batch `index`, on the device."""
        return self.examples.inputs(index)

    def targets(self, index: int) -> list[Tensor]:
        """Y_0 .. Y_K of micro-batch `index`, on the device."""
        return self.examples.targets(index)

    def distance(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        """sum_k c_k || Y_k - f_k ||^2, a float64 scalar (differentiable)."""
        parts = (mse_loss(f, y, reduction="sum").double() * c for f, y, c in zip(features, targets, self.coefficients))
        return sum(parts)

    @torch.no_grad()
    def loss(self, weight: Tensor) -> Tensor:
        """L(weight), a float64 scalar on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i in self.indices:
            total += self.distance(self.features(self.inputs(i), weight), self.targets(i))
        return total

    def linearise(self, weight: Tensor) -> Linearisation:
        """Loss, gradient and curvature products at `weight`."""
        return Linearisation(self, weight)


def with_shift(weight: Tensor, shift: float | Tensor = 0.0) -> Tensor:
    """The rows of a weight with one more column, a shift per output: (out, in + 1)."""
    column = torch.zeros_like(weight[:, :1].flatten(1)[:, :1]) + shift
    return torch.cat([weight.flatten(1), column.to(weight.dtype)], dim=1)


def without_shift(rows: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """(weight, shift (out,)) of rows (out, in + 1)."""
    return rows[:, :-1].reshape(layer.shape), rows[:, -1]


class Linearisation:
    """Loss, gradient and curvature products of an objective at one weight.

    The forward pass of each micro-batch and the graph of its first derivative are kept, so that a product costs one
    tangent pass and one backward pass and recomputes nothing. Micro-batches whose graphs do not fit in the memory
    budget are linearised again at every product: slower, the same result.

    loss: float64 scalar. gradient: as the weight, not masked. share: of the images, those that products look at. The
    loss and its gradient look at all of them; the curvature changes little with more (Byrd et al. 2011).

    """

    def __init__(self, objective: Objective, weight: Tensor):
        self.objective, self.weight = objective, weight
        self.loss = torch.zeros((), dtype=torch.float64, device=objective.device)
        self.gradient = torch.zeros_like(weight)
        budget, before = self._kept_bytes(), used_memory(objective.device)
        sample = objective.sample(objective.options.curvature_images)
        self.products: dict[int, Product | None] = {}  # of each micro-batch in the sample; None: does not fit
        self.share = sum(objective.examples.sizes[i] for i in sample) / objective.images
        for i in objective.indices:
            first_order, product = self._linearise(i) if i in sample else (partial(self._first_order, i), None)
            loss, gradient = first_order()
            self.loss += loss
            self.gradient += gradient
            kept = used_memory(objective.device) - before
            # Others may have taken what was free, and a heap with holes takes more than what is in use.
            room = free_memory(objective.device) >= budget / 2
            if i in sample:
                self.products[i] = product if kept <= budget and room else None

    def _kept_bytes(self) -> int:
        """Bytes that the graphs of micro-batches may take to be kept."""
        given = self.objective.kept_bytes
        return free_memory(self.objective.device) // 2 if given is None else given

    def _first_order(self, index: int) -> tuple[Tensor, Tensor]:
        objective, weight = self.objective, self.weight.detach().requires_grad_()
        with torch.enable_grad():
            loss = objective.distance(objective.features(objective.inputs(index), weight), objective.targets(index))
            return loss.detach(), grad(loss, weight)[0]

    def _linearise(self, index: int) -> tuple[FirstOrder, Product]:
        objective, weight = self.objective, self.weight.detach().requires_grad_()
        values, targets = objective.inputs(index), partial(objective.targets, index)
        kind = hessian if objective.options.curvature == "hessian" else gauss_newton
        with torch.enable_grad():
            return kind(objective, values, targets, weight)

    def product(self, vector: Tensor) -> Tensor:
        """B v over all the micro-batches, or the sample; `vector` and the result are shaped as the weight."""
        total = torch.zeros_like(vector)
        for i, product in self.products.items():
            total += (product or self._linearise(i)[1])(vector)
        return total if self.share == 1 else total / self.share


def hessian(
    objective: Objective, values: Values, targets: Callable[[], list[Tensor]], weight: Tensor
) -> tuple[FirstOrder, Product]:
    """(loss and gradient, product) with the exact Hessian: H v is the gradient of <grad L, v>, as in the paper."""
    loss = objective.distance(objective.features(values, weight), targets())
    (gradient,) = grad(loss, weight, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:  # L is linear in the weight here: every activation behind it is off
            return torch.zeros_like(vector)
        (result,) = grad(gradient, weight, vector, retain_graph=True, allow_unused=True)
        return torch.zeros_like(vector) if result is None else result

    return lambda: (loss.detach(), gradient.detach()), product


def gauss_newton(
    objective: Objective, values: Values, targets: Callable[[], list[Tensor]], weight: Tensor
) -> tuple[FirstOrder, Product]:
    """(loss and gradient, product) with the Gauss-Newton matrix: B v = 2 sum_k c_k J_k^T J_k v, positive semi-definite.

    J v is one tangent pass, J^T u one backward pass through the kept graph of the features. Only the loss and the
    gradient need the targets.
    """
    window = objective.window
    parameters = window.parameters(*objective.split(weight))
    values = window.run(window.nodes, values, parameters)
    features = [values[node] for node in window.features]
    tangents = Tangents(window, values, parameters)
    del values

    def transposed(cotangents: list[Tensor | None]) -> Tensor:
        # A feature that takes no more than the shape of what is behind the layer has no derivative.
        moved, scaled = [], []
        for f, c in zip(features, objective.coefficients):
            u = cotangents.pop(0)  # gone once it is scaled: all of them are as large as the features
            if f.requires_grad and u is not None:
                moved.append(f)
                scaled.append(2 * c * u)
        return grad(moved, weight, scaled, retain_graph=True)[0]

    def first_order() -> tuple[Tensor, Tensor]:
        found, wanted = [f.detach() for f in features], targets()
        loss = objective.distance(found, wanted)
        return loss, transposed([f - wanted.pop(0) for f in found])

    return first_order, lambda vector: transposed(tangents(*objective.split(vector)))


def reconstruction(
    layer: Layer,
    sparse: Stream,
    dense: Stream,
    options: Options,
    kept_bytes: int | None = None,
    groups: list[list[int]] | None = None,
) -> Objective:
    """The objective of a layer, both streams standing at it.

    options: besides what `Objective` takes, `k_step` and `targets`: "dense" takes the dense network's own features, so
        that the layer also repairs what the layers before it broke; "same" runs the dense network on the pruned
        network's current features (the paper's choice).
    groups: the micro-batches of each mini-batch; None: each is one.
    """
    window = Window(sparse.network, layer, options.k_step, sparse.model)
    teacher = Window(dense.network, layer, options.k_step, dense.model)
    dense_weight = dense.model.get_parameter(layer.parameter)

    def teach(values: Values) -> list[Tensor]:
        return teacher(teacher.enter(values), dense_weight)

    source = dense if options.targets == "dense" else sparse
    return Objective(Examples(window, sparse, source, teach, groups=groups or []), options, kept_bytes)
