"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): masks and weights of one layer, column by column.

Every output row w minimises its own  (w - w0)^T A (w - w0),  A being the second moment of the layer's input columns.
In a fixed order of the columns, removing w_j is answered on the columns after it by the optimal brain surgeon's step

    w_F  <-  w_F - w_j [A_F^-1]_:j / [A_F^-1]_jj,        F = {j, j + 1, ...},

and one Cholesky factor  A^-1 = U^T U  holds all of those rows: [A_F^-1]_j: / sqrt([A_F^-1]_jj) = U_j:. What a weight is
worth at that point is  w_j^2 / [A_F^-1]_jj = (w_j / U_jj)^2. Masks are chosen a few columns at a time, from the weights
as the columns before have left them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snows.masks.allocation import proportional, with_least
from snows.masks.patterns import NM, smallest_removed

INVERSE_DAMPING = 1e-2  # of A, in units of its mean diagonal
BLOCK = 128  # columns at a time, unless a pattern has groups of its own
Chooser = Callable[[Tensor, int], Tensor]  # (what columns j, j + 1, ... are worth (groups, out, n), j) -> which to keep


def choose_mask(weight: Tensor, moment: Tensor, rule: NM | int, zero: Tensor | None = None) -> Tensor:
    """SparseGPT's own mask of a weight (out, in, ...): N:M, or with `rule` weights removed, evenly from the blocks.

    moment: A, (groups, in, in), `in` as in weight.flatten(1). zero: what the mask leaves out whatever it is worth.
    """
    zeros = None if zero is None else to_columns(zero, len(moment))  # (groups, out, in)

    def zeros_at(start: int, worth: Tensor) -> Tensor | None:
        return None if zeros is None else zeros[:, :, start : start + worth.shape[2]]

    if isinstance(rule, NM):

        def choose(worth: Tensor, start: int) -> Tensor:
            gone = zeros_at(start, worth)
            return rule.mask(worth.flatten(0, 1), None if gone is None else gone.flatten(0, 1)).view(worth.shape)

        _, mask = eliminate(weight, moment, choose, rule.m)
        return mask
    columns = moment.shape[-1]
    blocks = {start: slice(start, start + BLOCK) for start in range(0, columns, BLOCK)}

    def split(count: int, starts: list[int]) -> dict[int, int]:
        return dict(zip(starts, proportional(count, [min(BLOCK, columns - start) for start in starts])))

    least = {start: 0 if zeros is None else int(zeros[:, :, block].sum()) for start, block in blocks.items()}
    counts = with_least(split, rule, least)

    def choose_evenly(worth: Tensor, start: int) -> Tensor:
        return smallest_removed(worth, counts[start], zero=zeros_at(start, worth))

    _, mask = eliminate(weight, moment, choose_evenly, BLOCK)
    return mask


def update(weight: Tensor, moment: Tensor, mask: Tensor) -> Tensor:
    """The weight (out, in, ...) with a given mask, its survivors made up for what was removed before them."""
    kept = to_columns(mask, len(moment))
    new, _ = eliminate(weight, moment, lambda worth, start: kept[:, :, start : start + worth.shape[2]], BLOCK)
    return new


def eliminate(weight: Tensor, moment: Tensor, choose: Chooser, width: int) -> tuple[Tensor, Tensor]:
    """(new weight, mask), both (out, in, ...): `choose` is asked about `width` columns at a time."""
    order = torch.arange(moment.shape[-1], device=weight.device).view(1, *weight.shape[1:])
    order = to_columns(order, 1).flatten()
    factor = torch.linalg.cholesky(damped_inverse(moment[:, order][:, :, order]), upper=True)  # U
    diagonal = factor.diagonal(dim1=1, dim2=2)
    rows = to_columns(weight, len(moment)).to(factor.dtype, copy=True)
    kept = torch.ones_like(rows, dtype=torch.bool)
    for start in range(0, rows.shape[2], width):
        end = min(start + width, rows.shape[2])
        kept[:, :, start:end] = choose((rows[:, :, start:end] / diagonal[:, None, start:end]).square(), start)
        errors = torch.zeros_like(rows[:, :, start:end])
        for j in range(start, end):
            error = rows[:, :, j].where(~kept[:, :, j], 0) / diagonal[:, j, None]
            rows[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            errors[:, :, j - start] = error
        rows[:, :, end:] -= errors @ factor[:, start:end, end:]
    return from_columns(rows.where(kept, 0), weight).to(weight.dtype), from_columns(kept, weight)


def damped_inverse(moment: Tensor) -> Tensor:
    """(A + lambda * mean diagonal * I)^-1, (groups, in, in), lambda = INVERSE_DAMPING."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(moment, INVERSE_DAMPING)))


def damped(moment: Tensor, damping: float) -> Tensor:
    """A + damping * mean diagonal * I, (groups, in, in)."""
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)
    mean = mean.where(mean > 0, 1.0)  # inputs that are zero throughout
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + damping * mean[:, None, None] * identity


def to_columns(weight: Tensor, groups: int) -> Tensor:
    """(out, in, ...) -> (groups, out / groups, columns), the input channels of one kernel position side by side."""
    return weight.movedim(1, -1).flatten(1).unflatten(0, (groups, -1))


def from_columns(rows: Tensor, weight: Tensor) -> Tensor:
    """Back to the shape of `weight`."""
    return rows.reshape(weight.movedim(1, -1).shape).movedim(-1, 1).contiguous()
