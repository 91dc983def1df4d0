"""ALPS (Meng, Behdin, Wang and Mazumder 2024, arXiv 2406.07831) as a method of snows.prune: mask and weights by ADMM.

With w0 a row of the dense weight, A the second moment of the layer's inputs in the pruned network, scaled to a unit
diagonal, and P the projection on the pattern, the row w and its sparse copy d are brought together by a multiplier v:

    w  <-  (A + rho I)^-1 (A w0 - v + rho d),      d  <-  P(w + v / rho),      v  <-  v + rho (w - d),

rho growing the faster the more of the support still changes. On the support that it ends with, least squares.
"""

from collections.abc import Callable
from functools import partial

import common  # noqa: F401  (it says where the project lies)
import torch
from torch import Tensor

from snows.calibration.streams import Streams
from snows.masks.choose import layer_budget
from snows.masks.patterns import NM, Pattern, smallest_removed
from snows.methods import ONE_PASS, Method, sparsegpt_problem
from snows.network.layers import Layer
from snows.options import Options
from snows.solve.layer import Update

DAMPING = 1e-2  # of the second moment, in units of its mean diagonal
FIRST_RHO = 0.1
GROWTH = ((0.1, 1.3), (5e-3, 1.2), (0.0, 1.1))  # (share of the support that has changed, factor of rho)
EVERY = 3  # iterations between two looks at the support
MOST = 300  # iterations


def admm(pattern: Pattern) -> Method:
    """The method for a pattern; of the masks that it is given it takes only how many weights each layer loses."""
    return Method(partial(update_by_admm, pattern=pattern), fixed=ONE_PASS, inverts_inputs=True)


def update_by_admm(layer: Layer, mask: Tensor, streams: Streams, options: Options, pattern: Pattern) -> Update:
    """The layer's sparse weight, whose zeros are its own."""
    weight, moment = sparsegpt_problem(layer, streams)
    rule = layer_budget(layer, mask, pattern)

    def choose(rows: Tensor) -> Tensor:
        scores = rows.reshape(weight.shape)
        kept = rule.mask(scores) if isinstance(rule, NM) else smallest_removed(scores, rule)
        return kept.view(rows.shape)

    moment = moment + DAMPING * torch.diag_embed(moment.diagonal(dim1=1, dim2=2).mean(1, True).expand(moment.shape[:2]))
    rows = weight.flatten(1).unflatten(0, (len(moment), -1)).to(moment.dtype)  # (groups, out / groups, in)
    solved = least_squares(rows, moment, split(rows, moment, choose))
    return Update(solved.reshape(weight.shape).to(weight.dtype))


def split(rows: Tensor, moment: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The support (groups, out, in) that the splitting ends with."""
    scale = moment.diagonal(dim1=1, dim2=2).sqrt()[:, None]  # (groups, 1, in)
    values, basis = torch.linalg.eigh(moment / scale.mT / scale)  # one factorisation serves every rho
    target = rows * scale @ (basis * values[:, None] @ basis.mT)  # A w0
    sparse, multiplier, rho = rows * scale, torch.zeros_like(rows), FIRST_RHO
    support = before = choose(sparse)
    sparse = sparse * support
    for iteration in range(1, MOST + 1):
        free = (target - multiplier + rho * sparse) @ (basis / (values[:, None] + rho) @ basis.mT)
        support = choose(free + multiplier / rho)
        sparse = (free + multiplier / rho) * support
        multiplier = multiplier + rho * (free - sparse)
        if iteration % EVERY == 0:
            changed = (support != before).sum().item() / max(1, support.sum().item())
            if changed == 0:
                break
            rho *= next(factor for share, factor in GROWTH if changed > share)
            before = support
    return support


def least_squares(rows: Tensor, moment: Tensor, support: Tensor) -> Tensor:
    """Each row w on its support S: A[S, S] w_S = (A w0)_S."""
    target, solved = rows @ moment, torch.zeros_like(rows)
    for group, row in torch.cartesian_prod(*map(torch.arange, rows.shape[:2])).tolist():
        (kept,) = support[group, row].nonzero(as_tuple=True)
        solved[group, row, kept] = torch.linalg.solve(moment[group][kept][:, kept], target[group, row, kept])
    return solved
