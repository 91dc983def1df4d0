"""The search for an order of channels in which N:M keeps more, for all the layers that read them at once.

From the order as it is, the two channels of different groups whose exchange keeps most more are exchanged, until no
exchange keeps more (Pool and Yu 2021). Then some groups are shuffled and the search goes on from there, and what keeps
less is taken back, until a fixed effort is spent: one that is counted, not timed, so that runs can be repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EFFORT = 3e8  # numbers compared: seconds on a CPU core
CLIMB = 7  # times the effort of counting all the gains anew is what it takes until no exchange keeps more
STEPS = 200  # of a climb, at most: rounding cannot make it go round
ROUNDS = 15  # of shuffling, at most
MIN_GROUPS = 8  # of the channels that are put in order together
OVERHEAD = 5e5  # numbers compared in the time of one step of the search that compares none
SHUFFLED = 3  # groups at a time
NOISE = 1e-4  # what a gain must be at least, as a share of what a channel keeps: rounding stays far below


@dataclass(frozen=True)
class Reading:
    """The score of each channel's weights, (channels, rows), in layers that keep n of m consecutive channels."""

    columns: Tensor
    n: int
    m: int

    def kept(self, order: Tensor) -> float:
        """The score that is kept in an order."""
        groups = self.columns[order.view(-1, self.m)]  # (groups, m, rows)
        return groups.topk(self.n, dim=1).values.sum(dtype=torch.float64).item()

    def of(self, channels: Tensor) -> Reading:
        """What reads some of the channels alone."""
        return replace(self, columns=self.columns[channels])

    def gains(self, order: Tensor, groups: Tensor) -> Tensor:
        """(groups x m, channels): what some groups keep more with any other channel in the place of each of theirs.

        With a channel less, a group keeps the n - 1 largest of each row, and the larger of the next one, t, and the
        new channel's weight w: the sum over the rows of max(t, w), which is (t + w + |t - w|) / 2.
        """
        members = order.view(-1, self.m)[groups]
        weights = self.columns[members]  # (groups, m, rows)
        last, next_one = weights.topk(self.n + 1, dim=1).values[:, -2:].unsqueeze(2).unbind(1)
        threshold = torch.where(weights >= last, next_one, last).flatten(0, 1)
        without = threshold.sum(1) - 2 * weights.maximum(last).sum(2).flatten()
        gains = torch.cdist(threshold, self.columns, p=1).add_(without[:, None]).add_(self.columns.sum(1)).div_(2)
        return (
            gains.view(len(members), self.m, -1).scatter_(2, members[:, None].expand(-1, self.m, -1), 0).flatten(0, 1)
        )


def natural(count: int) -> Tensor:
    """0, 1, 2 and so on, on the host whatever torch's default device is."""
    return torch.arange(count, device="cpu")


class Search:
    """An order that is improved exchange by exchange."""

    def __init__(self, readings: list[Reading], order: Tensor, effort: float):
        self.readings, self.order, self.effort = readings, order, effort
        self.gains = [torch.zeros(len(order), len(order), dtype=torch.float32, device="cpu") for _ in readings]
        self.kept = self._measure()
        self._refresh(natural(len(order)))

    def climb(self) -> None:
        """Exchange channels until no exchange keeps more."""
        for _ in range(STEPS):
            pairs = self._best_pairs()
            if not len(pairs):
                break
            one, other = pairs.unbind(1)
            self.order[one], self.order[other] = self.order[other], self.order[one]
            self._refresh(pairs.flatten())
        self.kept = self._measure()

    def shuffle(self, generator: torch.Generator) -> None:
        """Put the channels of a few groups in a random order."""
        m = max(reading.m for reading in self.readings)
        groups = torch.randperm(len(self.order) // m, generator=generator, device="cpu")[:SHUFFLED]
        places = (groups[:, None] * m + natural(m)).flatten()
        self.order[places] = self.order[places[torch.randperm(len(places), generator=generator, device="cpu")]]
        self._refresh(places)

    def state(self) -> tuple[Tensor, list[Tensor], float]:
        return self.order.clone(), [gains.clone() for gains in self.gains], self.kept

    def restore(self, state: tuple[Tensor, list[Tensor], float]) -> None:
        order, gains, self.kept = state
        self.order, self.gains = order.clone(), [each.clone() for each in gains]

    def _measure(self) -> float:
        return sum(reading.kept(self.order) for reading in self.readings)

    def _refresh(self, places: Tensor) -> None:
        """Count anew what the groups of some places gain by other channels."""
        for reading, gains in zip(self.readings, self.gains):
            groups = (places // reading.m).unique()
            rows = (groups[:, None] * reading.m + natural(reading.m)).flatten()
            gains[rows] = reading.gains(self.order, groups)
            self.effort -= OVERHEAD + len(rows) * reading.columns.numel() + gains.numel()

    def _best_pairs(self) -> Tensor:
        """(pairs, 2): places whose exchange keeps more, each the best for one of them, no group twice."""
        one_way = sum(self.gains)[:, self.order]
        best, partner = (one_way + one_way.T).max(1)
        used: list[set[int]] = [set() for _ in self.readings]
        pairs = []
        for place in best.argsort(descending=True, stable=True).tolist():
            if best[place] <= NOISE * self.kept / len(self.order):
                break
            other = int(partner[place])
            touched = [{place // reading.m, other // reading.m} for reading in self.readings]
            if not any(groups & taken for groups, taken in zip(touched, used)):
                pairs.append((place, other))
                used = [taken | groups for taken, groups in zip(used, touched)]
        return torch.tensor(pairs, dtype=torch.long, device="cpu").view(-1, 2)


def best_order(readings: list[Reading], seed: int = 0) -> tuple[Tensor, float, float]:
    """(order of the channels, score kept without it, and with it): the best that is found.

    Of many channels, each stays among some of its neighbours, so that the effort is bounded.
    """
    channels, numbers = len(readings[0].columns), sum(reading.columns.numel() for reading in readings)
    step = math.lcm(*(reading.m for reading in readings))
    parts = math.ceil(CLIMB * channels * numbers / EFFORT)
    blocks = natural(channels).split(max(math.ceil(channels / step / parts), MIN_GROUPS) * step)
    effort, generator = EFFORT / len(blocks), torch.Generator().manual_seed(seed)
    order = torch.cat([block[improved([each.of(block) for each in readings], effort, generator)] for block in blocks])
    before, after = (sum(each.kept(o) for each in readings) for o in (natural(channels), order))
    return (order, before, after) if after > before else (natural(channels), before, before)


def improved(readings: list[Reading], effort: float, generator: torch.Generator) -> Tensor:
    """The best order of some channels that an effort, or at least one climb, finds."""
    search = Search(readings, natural(len(readings[0].columns)), effort)
    search.climb()
    best = search.state()
    for _ in range(ROUNDS):
        if search.effort <= 0:
            break
        search.shuffle(generator)
        search.climb()
        if search.kept > best[2]:
            best = search.state()
        else:
            search.restore(best)
    return best[0]
