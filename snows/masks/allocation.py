"""Allocation: how many weights each layer loses, when all the layers together lose a given number.

Each rule takes the number to remove, the layers' scores (layer name -> what each weight is worth, of the weight's
shape; the smallest magnitudes go first) and each layer's cap, the most that it may lose, the caps adding up to at least
that number. It returns whole numbers that add up to it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", str, int)
Counts = dict[str, int]  # layer name -> how many
TINY = torch.finfo(torch.float32).tiny


def smallest_first(removed: int, scores: dict[str, Tensor], caps: Counts) -> Counts:
    """The smallest scores of all go first, and no layer loses more than its cap."""
    candidates = [score.abs().flatten().sort().values[: caps[name]] for name, score in scores.items()]
    layer = torch.cat([torch.full((len(c),), i, device="cpu") for i, c in enumerate(candidates)])
    chosen = torch.cat(candidates).argsort(stable=True)[:removed]
    counts = torch.bincount(layer[chosen.cpu()], minlength=len(scores))
    return dict(zip(scores, counts.tolist()))


def normalised(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's scores as shares of their sum, so that "smallest first" compares relative losses."""
    return {name: score.abs() / score.abs().sum().clamp_min(TINY) for name, score in scores.items()}


def uniform(removed: int, scores: dict[str, Tensor], caps: Counts) -> Counts:
    """Every layer loses the same share, give or take one weight."""
    sizes = {name: score.numel() for name, score in scores.items()}
    return rounded(removed, {name: removed * size / sum(sizes.values()) for name, size in sizes.items()}, caps)


def erdos_renyi_kernel(removed: int, scores: dict[str, Tensor], caps: Counts) -> Counts:
    """ERK (Evci et al. 2020): a layer keeps weights in proportion to the sum of its dimensions, not to their product.

    Small layers so stay denser. Where that would keep more than all of a layer, or less than its cap leaves, it is
    all, or what the cap leaves, and the other layers make up for it.
    """

    def lost(scale: float) -> dict[str, float]:
        wanted = {name: score.numel() - scale * sum(score.shape) for name, score in scores.items()}
        return {name: min(max(count, 0.0), caps[name]) for name, count in wanted.items()}

    low, high = 0.0, max(score.numel() / sum(score.shape) for score in scores.values())
    for _ in range(100):  # bisection: the larger the scale, the less is lost
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lost(middle).values()) > removed else (low, middle)
    return rounded(removed, lost(low), caps)


def rounded(removed: int, shares: dict[str, float], caps: Counts) -> Counts:
    """Shares that add up to `removed` as whole numbers that do, and none above its cap: the largest remainders gain."""
    counts = {name: min(int(share), caps[name]) for name, share in shares.items()}
    while left := removed - sum(counts.values()):
        below = [name for name in counts if counts[name] < caps[name]]
        below.sort(key=lambda name: counts[name] - shares[name])
        for name in below[:left]:
            counts[name] += 1
    return counts


ALLOCATIONS = {"global": smallest_first, "uniform": uniform, "erk": erdos_renyi_kernel}


def with_least(split: Callable[[int, list[Key]], dict[Key, int]], total: int, least: dict[Key, int]) -> dict[Key, int]:
    """What `split` makes of a total among some keys, but no key gets less than `least`: the others make up for it.

    Where `least` adds up to more than the total, each gets that. split: (total, keys) -> each key's part, adding up to
    the total.
    """
    fixed: dict[Key, int] = {}
    while True:
        free = [key for key in least if key not in fixed]
        counts = split(max(total - sum(fixed.values()), 0), free)
        short = {key: least[key] for key in free if counts[key] < least[key]}
        if not short:
            return fixed | counts
        fixed |= short


def even(total: int, rows: Sequence[int]) -> dict[int, int]:
    """Split `total` evenly among rows, give or take one."""
    bounds = [total * i // max(len(rows), 1) for i in range(len(rows) + 1)]
    return {row: end - start for row, start, end in zip(rows, bounds, bounds[1:])}


def proportional(total: int, sizes: list[int]) -> list[int]:
    """Split `total` in proportion to `sizes`, in whole numbers that add up to it."""
    counts, seen, given = [], 0, 0
    for size in sizes:
        seen += size
        share = round(total * seen / sum(sizes))
        counts.append(share - given)
        given = share
    return counts
