"""Truncated Newton on the support: conjugate gradients (cg.py), Armijo backtracking, adaptive damping.

One step solves (B + lambda I) d = -grad L on the support S = {i : mask_i = 1} (the paper's Newton step), with B
known only through its products with vectors, which are shaped as theta and zero off the support.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from snows.network.tangent import dot
from snows.options import Options
from snows.solve.cg import Operator, check_finite, conjugate_gradients
from snows.solve.curvature import Curvature
from snows.solve.objective import Objective
from snows.solve.recycled import Recycled

SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
MAX_HALVINGS = 8
STAGNATION = 1e-3  # relative decrease of the loss below which another Newton step is not worth its products


@dataclass
class LineSearch:
    """The outcome of a line search: the accepted share of the step (0: none) and the loss there."""

    length: float
    loss: Tensor


def backtrack(loss: Operator, theta: Tensor, step: Tensor, start: Tensor, slope: Tensor) -> LineSearch:
    """Halve t until L(theta + t d) <= L(theta) + c t <grad L, d>; `start`, `slope` and `loss` are of the same data."""
    length = 1.0
    for _ in range(MAX_HALVINGS + 1):
        trial = loss(theta + length * step)
        if trial <= start + SUFFICIENT_DECREASE * length * slope:
            return LineSearch(length, trial)
        length /= 2
    return LineSearch(0.0, start)


@dataclass
class SolveStats:
    """What a solution took."""

    loss_before: float = float("nan")
    loss_after: float = float("nan")
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
    cg = conjugate_gradients(
        recycled.noting(lambda v: here.matvec(v).mul_(support)),
        descent,
        recycled,
        damping=damping,
        tolerance=options.cg_tolerance,
        max_iterations=options.max_CG_iterations,
    )
    result = NewtonStep(theta, damping, here.loss, here.loss, cg.residuals, here.share)
    slope = -dot(descent, cg.step)
    if not slope < 0:  # a zero gradient, or nothing found
        return replace(result, searched=False)
    search = backtrack(objective.loss, theta, cg.step, here.loss, slope)
    # Levenberg-Marquardt: trust the quadratic model more where it predicted well, less where it did not.
    predicted = -(slope + dot(cg.step, cg.product) / 2)
    ratio = (here.loss - search.loss) / predicted
    if search.length < 1 or ratio < 0.25:
        damping *= 4
    elif ratio > 0.75:
        damping /= 4
    return replace(result, theta=theta + search.length * cg.step, damping=damping, after=search.loss)
