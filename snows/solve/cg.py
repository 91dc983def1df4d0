"""Preconditioned conjugate gradients on (B + lambda I) x = b, where B is known only by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from snows.network.tangent import dot

Operator = Callable[[Tensor], Tensor]  # a linear map, known by its products with vectors


@dataclass
class CGResult:
    """The step d found, B d, and how it was found."""

    step: Tensor
    product: Tensor
    residuals: list[float]  # relative residual norms, one per iteration
    negative_curvature: bool = False  # whether a direction of no positive curvature ended it

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
) -> CGResult:
    """Approximately solve (B + lambda I) x = b, B given by `matvec`, b by `right_side`.

    damping: lambda in units of the curvature along the first direction, p^T B p / p^T p: one value for any scale.
    tolerance: stop once ||b - (B + lambda I) x|| <= tolerance * ||b||; the least is the type's own precision.

    Stops at the first direction whose curvature is not positive, and where the residual has become too small for the
    type to tell a direction from it, with what it has; if that is the very first direction, with a step along it.

    Raises:
        FloatingPointError: the right side, a product or a preconditioned residual is NaN or infinite.
    """
    x, bx, r = torch.zeros_like(right_side), torch.zeros_like(right_side), right_side
    norm = check_finite(right_side.norm(), "the gradient")
    if not norm > 0:
        return CGResult(x, bx, [])
    tolerance, residuals = max(tolerance, torch.finfo(right_side.dtype).eps), list[float]()
    precondition = precondition or (lambda residual: residual)
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
        seen = Seen(*torch.stack([damped, next_r.norm() / norm, alpha * pp.sqrt(), rz, pp]).tolist())
        verdict = seen.verdict(first=not residuals)
        if verdict is Verdict.NEGATIVE:
            if not residuals:
                alpha = rz / abs(seen.curvature) if seen.curvature else torch.ones_like(rz)
                x, bx = alpha * p, alpha * bp
            return CGResult(x, bx, residuals, negative_curvature=True)
        if verdict is Verdict.EXHAUSTED:
            break
        x += alpha * p  # in place: of all layers together, each vector may take a large share of the memory
        bx += alpha * bp
        r = next_r
        residuals.append(seen.residual)
        if seen.residual <= tolerance:
            break
        z = precondition(r)
        rz, previous = dot(r, z), rz
        p = z + (rz / previous) * p
    return CGResult(x, bx, residuals)


class Verdict(Enum):
    """What becomes of an iteration: its step is taken, or CG ends before it, for want of a residual or of a minimum."""

    TAKE = auto()
    EXHAUSTED = auto()
    NEGATIVE = auto()


class Seen(NamedTuple):
    """The numbers of an iteration along p: p^T (B + lambda I) p, ||r|| / ||b|| after it, ||alpha p||, r^T z, p^T p."""

    curvature: float
    residual: float
    length: float
    rz: float
    pp: float

    def verdict(self, first: bool) -> Verdict:
        """Whether the step can be told from rounding.

        Raises:
            FloatingPointError: a product is not finite, or the first step is not.
        """
        if 0 in (self.rz, self.pp) or not (first or (math.isfinite(self.rz) and math.isfinite(self.pp))):
            return Verdict.EXHAUSTED  # the direction vanishes in its square, or has come of a residual that does
        if not math.isfinite(self.curvature):
            raise FloatingPointError("a curvature product is not finite")
        if not self.curvature > 0:
            return Verdict.NEGATIVE
        if math.isfinite(self.residual + self.length):
            return Verdict.TAKE
        if first:
            raise FloatingPointError("the step is not finite")
        return Verdict.EXHAUSTED  # the curvature is too small to divide by


def check_finite(value: Tensor, what: str) -> Tensor:
    """The value, if it holds no NaN and no infinity.

    Raises:
        FloatingPointError: it does.
    """
    if not value.isfinite().all():
        raise FloatingPointError(f"{what} is not finite")
    return value
