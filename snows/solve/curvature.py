"""The curvature B of an objective: its products with vectors, B v, exact at any size; no matrix is ever formed.

Hessian         B = the second derivatives of L: B v is the gradient of <grad L, v>              (as in the paper)
Gauss-Newton    B = 2 sum_k c_k J_k^T J_k, J_k the derivatives of f_k: positive semi-definite
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from snows.budget import Allowance
from snows.network.tangent import Tangents
from snows.solve.objective import Objective


class GaussNewton:
    """B of one micro-batch: J v is one tangent pass, J^T u one backward pass through the kept graph of the features."""

    def __init__(self, objective: Objective, index: int, theta: Tensor):
        self.objective, self.index, self.theta = objective, index, theta
        window, self.variables = objective.window, objective.variables
        parameters = window.parameters(*self.variables.unpack(theta))
        values = window.run(window.nodes, objective.inputs(index), parameters)
        self.features = [values[node] for node in window.features]
        self.tangents = Tangents(window, values, parameters)

    def first_order(self) -> tuple[Tensor, Tensor]:
        """(loss, gradient); only these need the targets."""
        found, targets = [f.detach() for f in self.features], self.objective.targets(self.index)
        loss = self.objective.feature_loss(found, targets)
        return loss, self._transposed([f - targets.pop(0) for f in found])

    def matvec(self, vector: Tensor) -> Tensor:
        """B v."""
        return self._transposed(self.tangents(*self.variables.unpack(vector)))

    def _transposed(self, cotangents: list[Tensor | None]) -> Tensor:
        """2 sum_k c_k J_k^T u_k. A feature that takes no more than the layer's shape has no derivative."""
        moved, scaled = [], []
        for f, c in zip(self.features, self.objective.coefficients):
            u = cotangents.pop(0)  # gone once it is scaled: all of them are as large as the features
            if f.requires_grad and u is not None:
                moved.append(f)
                scaled.append(2 * c * u)
        return grad(moved, self.theta, scaled, retain_graph=True)[0]


class Hessian:
    """B of one micro-batch, by differentiating its gradient once more."""

    def __init__(self, objective: Objective, index: int, theta: Tensor):
        self.theta = theta
        self.loss = objective.feature_loss(objective.features(objective.inputs(index), theta), objective.targets(index))
        (self.gradient,) = grad(self.loss, theta, create_graph=True)

    def first_order(self) -> tuple[Tensor, Tensor]:
        """(loss, gradient)."""
        return self.loss.detach(), self.gradient.detach()

    def matvec(self, vector: Tensor) -> Tensor:
        """B v; zero where L is linear in theta, every activation after the layer being off."""
        if not self.gradient.requires_grad:
            return torch.zeros_like(vector)
        (result,) = grad(self.gradient, self.theta, vector, retain_graph=True, allow_unused=True)
        return torch.zeros_like(vector) if result is None else result


MicroBatchCurvature = GaussNewton | Hessian
OPERATORS: dict[str, type[GaussNewton] | type[Hessian]] = {
    "ggn": GaussNewton,
    "hessian": Hessian,
}  # by the option `curvature`


class Curvature:
    """B at theta, the sum over the micro-batches, with the loss and its gradient there.

    loss: float64 scalar. gradient: as theta, not masked; both look at all the images.
    share: of the images, those that products look at: the curvature changes little with more (Byrd et al. 2011).

    What a micro-batch's operator has computed is kept where memory allows it, so that a product costs one tangent pass
    and one backward pass and computes nothing again. Otherwise it is made anew for every product: slower, the same
    result.
    """

    def __init__(self, objective: Objective, theta: Tensor):
        self.objective, self.theta = objective, theta
        self.loss = torch.zeros((), dtype=torch.float64, device=objective.device)
        self.gradient = torch.zeros_like(theta)
        sample = objective.sample(objective.options.curvature_images)
        self.share = sum(objective.examples.sizes[i] for i in sample) / objective.images
        self.operators: dict[int, MicroBatchCurvature | None] = {}  # None: does not fit the memory
        allowance = Allowance(objective.device, objective.kept_bytes)
        for i in objective.own(objective.indices):
            operator = self._operator(i) if i in sample else None
            loss, gradient = self._first_order(i) if operator is None else operator.first_order()
            self.loss += loss
            self.gradient += gradient
            if i in sample:
                self.operators[i] = operator if allowance.holds() else None
        self.loss, self.gradient = objective.group.sum(self.loss), objective.group.sum(self.gradient)

    def matvec(self, vector: Tensor) -> Tensor:
        """B v over all the micro-batches, or the sample; `vector` and the result are shaped as theta."""
        total = torch.zeros_like(vector)
        for i, operator in self.operators.items():
            total += (operator or self._operator(i)).matvec(vector)
        total = self.objective.group.sum(total)
        return total if self.share == 1 else total / self.share

    @torch.enable_grad()
    def _operator(self, index: int) -> MicroBatchCurvature:
        kind = OPERATORS[self.objective.options.curvature]
        return kind(self.objective, index, self.theta.detach().requires_grad_())

    @torch.enable_grad()
    def _first_order(self, index: int) -> tuple[Tensor, Tensor]:
        objective, theta = self.objective, self.theta.detach().requires_grad_()
        features = objective.features(objective.inputs(index), theta)
        loss = objective.feature_loss(features, objective.targets(index))
        return loss.detach(), grad(loss, theta)[0]
