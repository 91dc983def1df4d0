"""Products that the Newton steps before have made, in the preconditioner of the next: BFGS of limited memory.

Each step solves a system of its own, with a matrix that hardly differs from that of the step before, and conjugate
gradients would begin again from nothing. Their directions p and products B p improve a preconditioner H:

    H+ = (I - rho p (B p)^T) H (I - rho (B p) p^T) + rho p p^T,      rho = 1 / p^T B p.

It is symmetric, positive definite where H is, and gives p for B p (Nocedal and Wright, Numerical Optimization, 2006,
section 7.2). What lies in the space of those directions is so solved by the first iteration, and the others look beyond
it: of a quadratic loss, steps of m iterations each come to what one of as many together does (Morales and Nocedal,
Automatic preconditioning by limited memory quasi-Newton updating, SIAM J. Optim. 10, 2000).
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from snows.network.tangent import dot
from snows.solve.cg import Operator


class Recycled:
    """H around a preconditioner (None: the identity), of the last `most` products that it was told of."""

    def __init__(self, precondition: Operator | None, most: int):
        self.precondition = precondition or (lambda residual: residual)
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=most)  # p, B p, rho; the oldest first
        self.noted: deque[tuple[Tensor, Tensor]] = deque(maxlen=most)

    def noting(self, matvec: Operator) -> Operator:
        """`matvec`, noting its products, which are used from the next `learn` on: H must not change meanwhile."""

        def product(p: Tensor) -> Tensor:
            bp = matvec(p)
            self.noted.append((p, bp))
            return bp

        return product

    def learn(self) -> None:
        """Take over the products that were noted, of the directions with a curvature that is positive."""
        if self.noted:
            for pair, curvature in zip(self.noted, torch.stack([dot(*pair) for pair in self.noted]).tolist()):
                if curvature > 0 and math.isfinite(1 / curvature):
                    self.pairs.append((*pair, 1 / curvature))
        self.noted.clear()

    def __call__(self, residual: Tensor) -> Tensor:
        if not self.pairs:
            return self.precondition(residual)
        left, shares = residual.clone(), []
        for p, bp, rho in reversed(self.pairs):
            shares.append(rho * dot(p, left))
            left -= shares[-1] * bp
        solved = self.precondition(left)
        for (p, bp, rho), share in zip(self.pairs, reversed(shares)):
            solved = solved + (share - rho * dot(bp, solved)) * p
        return solved
