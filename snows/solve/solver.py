"""Truncated Newton on the support: preconditioned conjugate gradients, Armijo backtracking, adaptive damping.

One step solves (B + lambda I) d = -grad L on the support S = {i : mask_i = 1} (the paper's Newton step), with B
known only through its products with vectors, which are shaped as theta and zero off the support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from snows.options import Options
from snows.solve.curvature import Curvature
from snows.solve.objective import Objective
from snows.solve.recycled import Operator, Recycled, dot

SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
MAX_HALVINGS = 8
PATIENCE = 2  # iterates of CG that may fail to lower the loss on images held out, one after the other
STAGNATION = 1e-3  # relative decrease of the loss below which another Newton step is not worth its products


@dataclass
class CGResult:
    """The step d found, B d, and how it was found."""

    step: Tensor
    product: Tensor
    residuals: list[float]  # relative residual norms, one per iteration
    negative_curvature: bool = False

    @property
    def iterations(self) -> int:
        return len(self.residuals)


def conjugate_gradients(
    matvec: Operator,
    right_side: Tensor,
    precondition: Operator | None = None,
    damping: float = 0.0,
    tolerance: float = 1e-2,
    max_iterations: int = 20,
    watch: Callable[[Tensor, Tensor], bool] = lambda step, product: True,
) -> CGResult:
    """Approximately solve (B + lambda I) x = b, B given by `matvec`, b by `right_side`.

    damping: lambda in units of the curvature along the first direction, p^T B p / p^T p: one value for any scale.
    tolerance: stop once ||b - (B + lambda I) x|| <= tolerance * ||b||; the least is the type's own precision.
    watch: told x and B x after each iteration, which change in place; whether to go on.

    Stops at the first direction whose curvature is not positive, and where the residual has become too small for the
    type to tell a direction from it, with what it has; if that is the very first direction, with a step along it.

    Raises FloatingPointError where the right side, a product or a preconditioned residual is NaN or infinite.
    """
    x, bx, r = torch.zeros_like(right_side), torch.zeros_like(right_side), right_side
    norm = check_finite(right_side.norm(), "the gradient")
    if not norm > 0:
        return CGResult(x, bx, [])
    precondition = precondition or (lambda residual: residual)
    tolerance, residuals = max(tolerance, torch.finfo(right_side.dtype).eps), list[float]()
    z = precondition(r)
    p, rz, shift = z, dot(r, z), None
    for _ in range(max_iterations):
        bp, pp = matvec(p), dot(p, p)
        curvature = dot(p, bp)
        if shift is None:
            shift = damping * (curvature / pp).clamp_min(0)
        damped = curvature + shift * pp
        alpha = rz / damped
        next_r = r - alpha * (bp + shift * p)
        # The only values that the host waits for, once an iteration.
        numbers = torch.stack([damped, next_r.norm() / norm, alpha * pp.sqrt(), rz, pp])
        steepness, residual, length, *squares = numbers.tolist()
        if 0 in squares or (residuals and not all(map(math.isfinite, squares))):
            break  # the direction vanishes in its square, or has come of a residual that does
        if not math.isfinite(steepness):
            raise FloatingPointError("a curvature product is not finite")
        if not steepness > 0:
            if not residuals:
                alpha = rz / abs(steepness) if steepness else torch.ones_like(rz)
                x, bx = alpha * p, alpha * bp
            return CGResult(x, bx, residuals, negative_curvature=True)
        if residuals and not math.isfinite(residual + length):
            break  # the curvature is too small to divide by
        if not math.isfinite(residual + length):
            raise FloatingPointError("the step is not finite")
        x += alpha * p  # in place: of all layers together, each vector may take a large share of the memory
        bx += alpha * bp
        r = next_r
        residuals.append(residual)
        if not watch(x, bx) or residual <= tolerance:
            break
        z = precondition(r)
        rz, previous = dot(r, z), rz
        p = z + (rz / previous) * p
    return CGResult(x, bx, residuals)


def check_finite(value: Tensor, what: str) -> Tensor:
    """The value, if it holds no NaN and no infinity.

    Raises:
        FloatingPointError: it does.
    """
    if not value.isfinite().all():
        raise FloatingPointError(f"{what} is not finite")
    return value


class EarlyStop:
    """Of the iterates of CG, the one at which the loss on images that are held out is least.

    Truncated CG regularises as a ridge does (each iteration lets in directions of less curvature), so that the images
    say how much: once an iterate has lowered their loss, CG goes on until PATIENCE in a row have not. Where none does,
    the steps are too long for them, and a part of CG's last one may still do.
    """

    def __init__(self, held_out: Objective, theta: Tensor):
        self.held_out, self.theta = held_out, theta
        self.start = self.loss = held_out.loss(theta)
        self.found: tuple[Tensor, Tensor] | None = None  # the best iterate and its product
        self.worse = 0

    def __call__(self, step: Tensor, product: Tensor) -> bool:
        loss = self.held_out.loss(self.theta + step)
        if loss < self.loss:
            self.loss, self.worse, self.found = loss, 0, (step.clone(), product.clone())
        else:
            self.worse += 1
        return self.found is None or self.worse < PATIENCE

    def take(self, cg: CGResult) -> tuple[Tensor, Tensor]:
        """The best iterate and its product, which are kept no longer; CG's last where none has lowered the loss."""
        found, self.found = self.found, None
        return found or (cg.step, cg.product)

    def shorten(self, search: Armijo, direction: Tensor, fitted: Objective, before: Tensor) -> Armijo:
        """A line search's step, halved until it lowers the loss here too; none, if it never does."""
        for halvings in range(MAX_HALVINGS + 1 if search.length else 0):
            length = search.length / 2**halvings
            theta = self.theta + length * direction
            self.loss = self.held_out.loss(theta)
            if self.loss < self.start:
                return Armijo(length, fitted.loss(theta)) if halvings else search
        self.loss = self.start
        return Armijo(0.0, before)


@dataclass
class Armijo:
    """The outcome of a line search: the accepted share of the step (0: none) and the loss there."""

    length: float
    loss: Tensor


def backtrack(loss: Operator, theta: Tensor, step: Tensor, start: Tensor, slope: Tensor) -> Armijo:
    """Halve t until L(theta + t d) <= L(theta) + c t <grad L, d>; `start`, `slope` and `loss` are of the same data."""
    length = 1.0
    for _ in range(MAX_HALVINGS + 1):
        trial = loss(theta + length * step)
        if trial <= start + SUFFICIENT_DECREASE * length * slope:
            return Armijo(length, trial)
        length /= 2
    return Armijo(0.0, start)


@dataclass
class SolveStats:
    """What a solution took."""

    loss_before: float = float("nan")
    loss_after: float = float("nan")
    held_out_before: float = float("nan")  # the loss on images that were held out, where any were
    held_out_after: float = float("nan")
    newton_steps: int = 0
    cg_iterations: int = 0
    products: float = 0.0  # curvature-vector products, in units of the whole calibration set
    residuals: list[list[float]] = field(default_factory=list)  # relative, one list per CG solve
    problem: str = ""  # why nothing was solved, if so


def solve(
    objective: Objective, theta: Tensor, support: Tensor, precondition: Operator | None, options: Options
) -> tuple[Tensor, SolveStats]:
    """(theta, what it took): minimise the objective over the support, from `theta`, which is zero off it.

    options: `newton_steps`, `max_CG_iterations`, `cg_tolerance`, `damping`, and `batching`: False takes every Newton
        step on the whole calibration set; True takes one for each mini-batch in turn, `newton_steps` times over.
        `recycle`: products of the steps before that precondition the next, where all are of the same images.

    Raises:
        FloatingPointError: the loss, its gradient, a product or a preconditioned residual is NaN or infinite.
    """
    stats, damping = SolveStats(), options.damping
    parts = objective.mini_batches() if options.batching else [objective]
    again = options.newton_steps > 1 and not options.batching  # other images have another matrix
    recycled = Recycled(precondition, options.recycle if again else 0)
    for number in range(options.newton_steps):
        start = theta
        for part in parts:
            step = newton_step(part, theta, support, recycled, damping, options)
            theta, damping = step.theta, step.damping
            stats.newton_steps += step.searched
            stats.cg_iterations += len(step.residuals)
            stats.products += len(step.residuals) * step.share / len(parts)
            stats.residuals.append(step.residuals)
            if step.unseen is not None:
                stats.held_out_after = step.unseen.loss.item()
                if number == 0:
                    stats.held_out_before = step.unseen.start.item()
        before, after = step.before, step.after
        if options.batching:  # steps that each helped their own mini-batch may still hurt the whole
            before, after = objective.loss(start), objective.loss(theta)
        if number == 0:
            stats.loss_before = before.item()
        stats.loss_after = min(before, after).item()
        if not after < before:
            return start, stats
        if before - after < STAGNATION * after:
            break
        recycled.learn()
    return theta, stats


@dataclass
class NewtonStep:
    """Where a step leads, and what it took."""

    theta: Tensor
    damping: float  # of the next step
    before: Tensor
    after: Tensor
    residuals: list[float]  # of CG, one per iteration; its vectors are as large as theta, and not kept
    share: float  # of the images, those that its products looked at
    searched: bool = True  # whether there was a direction to search along
    unseen: EarlyStop | None = None  # what the images that were held out say


def newton_step(
    objective: Objective,
    theta: Tensor,
    support: Tensor,
    recycled: Recycled,
    damping: float,
    options: Options,
) -> NewtonStep:
    """One damped Newton step on one objective; its products are noted."""
    here = Curvature(objective, theta)
    check_finite(here.loss, "the loss")
    descent = here.gradient.mul_(support).neg_()
    unseen = None if objective.held_out is None else EarlyStop(objective.held_out, theta)
    cg = conjugate_gradients(
        recycled.noting(lambda v: here.matvec(v).mul_(support)),
        descent,
        recycled,
        damping,
        options.cg_tolerance,
        options.max_CG_iterations,
        unseen or (lambda step, product: True),
    )
    direction, product = (cg.step, cg.product) if unseen is None else unseen.take(cg)
    result = NewtonStep(theta, damping, here.loss, here.loss, cg.residuals, here.share, unseen=unseen)
    slope = -dot(descent, direction)
    if not slope < 0:  # a zero gradient, or nothing found
        return replace(result, searched=False)
    search = backtrack(objective.loss, theta, direction, here.loss, slope)
    # Levenberg-Marquardt: trust the quadratic model more where it predicted well, less where it did not.
    predicted = -(slope + dot(direction, product) / 2)
    ratio = (here.loss - search.loss) / predicted
    if search.length < 1 or ratio < 0.25:
        damping *= 4
    elif ratio > 0.75:
        damping /= 4
    if unseen is not None:
        search = unseen.shorten(search, direction, objective, here.loss)
    return replace(result, theta=theta + search.length * direction, damping=damping, after=search.loss)
