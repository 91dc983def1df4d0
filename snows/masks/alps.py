"""ALPS (Meng, Behdin, Wang and Mazumder 2024, arXiv 2406.07831): the mask of one layer, all its columns at a time.

With w0 a row of the weight as it stands, A the second moment of the layer's input columns, scaled to a unit diagonal,
and P the projection on what the pattern allows, ADMM brings the row w and its sparse copy d together by a multiplier v:

    w  <-  (A + rho I)^-1 (A w0 - v + rho d),      d  <-  P(w + v / rho),      v  <-  v + rho (w - d),

rho growing the faster the more of the support still changes. The support that it ends with is the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snows.masks.patterns import NM, smallest_removed
from snows.masks.sparsegpt import INVERSE_DAMPING, damped

FIRST_RHO = 0.1
GROWTH = ((0.1, 1.3), (5e-3, 1.2), (0.0, 1.1))  # (share of the support that has changed, factor of rho)
EVERY = 3  # iterations between two looks at the support
MOST = 300  # iterations


def choose_mask(weight: Tensor, moment: Tensor, rule: NM | int, zero: Tensor | None = None) -> Tensor:
    """The mask of a weight (out, in, ...): N:M, or with `rule` weights removed from anywhere in it.

    moment: A, (groups, in, in), `in` as in weight.flatten(1). zero: what the mask leaves out whatever it is worth.
    """

    def project(rows: Tensor) -> Tensor:
        scores = rows.reshape(weight.shape)
        kept = rule.mask(scores, zero) if isinstance(rule, NM) else smallest_removed(scores, rule, zero=zero)
        return kept.view(rows.shape)

    rows = weight.flatten(1).unflatten(0, (len(moment), -1)).to(moment.dtype)  # (groups, out / groups, in)
    return split(rows, damped(moment, INVERSE_DAMPING), project).view(weight.shape)


def split(rows: Tensor, moment: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The support (groups, out, in) that the splitting ends with."""
    scale = moment.diagonal(dim1=1, dim2=2).sqrt()[:, None]  # (groups, 1, in)
    values, basis = torch.linalg.eigh(moment / scale.mT / scale)  # one factorisation serves every rho
    target = (rows * scale @ basis * values[:, None]) @ basis.mT  # A w0
    sparse, multiplier, rho = rows * scale, torch.zeros_like(rows), FIRST_RHO
    support = before = project(sparse)
    sparse = sparse * support
    for iteration in range(1, MOST + 1):
        free = ((target - multiplier + rho * sparse) @ basis / (values[:, None] + rho)) @ basis.mT
        support = project(free + multiplier / rho)
        sparse = (free + multiplier / rho) * support
        multiplier = multiplier + rho * (free - sparse)
        if iteration % EVERY == 0:
            changed = (support != before).sum().item() / max(1, support.sum().item())
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed > share)
            before = support
    return support
