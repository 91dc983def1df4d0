"""Which weights survive: a pattern, unstructured or N:M, over what each weight is worth (snows/masks/saliency.py).

A pattern turns the scores of the prunable layers into boolean masks (True: survives). Layers that it cannot prune it
leaves dense, and says why.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from snows.errors import UsageError
from snows.masks.allocation import ALLOCATIONS, Counts, even, normalised, with_least
from snows.masks.rules import DENSE, Rules, check_patterns, rule_of
from snows.masks.selection import Selection
from snows.network.layers import Masks

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

LEFT_DENSE = "dense, as its rule asks"


@dataclass(frozen=True)
class Unstructured:
    """Remove the weights of smallest score: of smallest magnitude, where the weights themselves are the scores.

    target_sparsity: share of *all* the model's parameters (biases and norms count, but are not pruned) to set to zero.
    max_layer_sparsity: no layer without a sparsity of its own loses a larger share of its weights; None: halfway
        between the target and 1, or, if too few layers may be pruned for that, between the share that they must lose
        and 1.
    allocation: "global" compares scores across layers, "uniform" gives every layer the same sparsity, "erk" keeps
        small layers denser (Evci et al. 2020).
    normalise: "global" compares each layer's scores as shares of their sum, as suits Wanda's and SparseGPT's, which
        are in units of each layer's own output. None: where the scores are (`Saliency.layer_wise`).
    layer_sparsity: layer name or pattern -> share of its own weights that a layer loses, or "dense". The other layers
        lose what is missing to the target; if there are none, the target plays no part.
    on_the_way: of a pattern that `path` gives: where its rules alone remove more than its target, the target gives way.

    Raises:
        UsageError: a share outside [0, 1), or a target that the cap or the unpruned parameters put out of reach.
    """

    target_sparsity: float
    max_layer_sparsity: float | None = None
    allocation: str = "global"
    normalise: bool | None = None
    layer_sparsity: Rules = field(default_factory=dict)
    on_the_way: bool = field(default=False, kw_only=True, repr=False)

    def __post_init__(self):
        for share in (self.target_sparsity, self.max_layer_sparsity or 0.0):
            if not isinstance(share, (int, float)):
                raise UsageError(f"a sparsity must be a number, not {share!r}.")
        if not 0 <= self.target_sparsity < 1:
            raise UsageError(f"target sparsity {self.target_sparsity:g} is outside [0, 1).")
        if self.max_layer_sparsity is not None and not 0 <= self.max_layer_sparsity <= 1:
            raise UsageError(f"max layer sparsity {self.max_layer_sparsity:g} is outside [0, 1].")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"allocation '{self.allocation}' is not one of {', '.join(ALLOCATIONS)}.")
        for pattern, rule in self.layer_sparsity.items():
            number = isinstance(rule, (int, float)) and not isinstance(rule, bool) and 0 <= rule < 1
            if not number and rule != DENSE:
                raise UsageError(f"layer sparsity of {pattern}: {rule!r} is neither a share in [0, 1) nor '{DENSE}'.")

    def __str__(self) -> str:
        return f"{self.target_sparsity:.0%} unstructured{', layer rules' * bool(self.layer_sparsity)}"

    @property
    def compares_layers(self) -> bool:
        """Whether how many weights a layer loses depends on its scores among those of the others."""
        return self.allocation == "global"

    def path(self, steps: int) -> list[Unstructured]:
        """Rising sparsities on the way to the target, the share of what is left falling evenly; `steps` of them."""
        return [self.part_way(i / (steps + 1)) for i in range(1, steps + 1)]

    def part_way(self, share: float) -> Unstructured:
        """The pattern at a share of the way."""

        def part(sparsity: float) -> float:
            return 1 - (1 - sparsity) ** share

        rules = {name: rule if rule == DENSE else part(rule) for name, rule in self.layer_sparsity.items()}
        return replace(self, target_sparsity=part(self.target_sparsity), layer_sparsity=rules, on_the_way=True)

    def cap(self, needed: float) -> float:
        """The largest share that one layer may lose; needed: the share that all the layers together must lose."""
        if self.max_layer_sparsity is not None:
            return self.max_layer_sparsity
        halfway = (1 + self.target_sparsity) / 2
        return halfway if needed <= halfway else min(1.0, (1 + needed) / 2)

    def select(
        self, scores: dict[str, Tensor], total_parameters: int, by_row: bool = False, zeros: Masks | None = None
    ) -> Selection:
        """Masks from `scores` (layer name -> weight, or what each weight is worth) in a model of `total_parameters`.

        by_row: within a layer, compare the weights of one output row (one filter), each of which loses the same
            number, give or take one. Exact to one weight.
        zeros: the weights that go whatever the scores, of the layers that have such; they count.
        """
        zeros = zeros or {}
        least = {name: int(zeros[name].sum()) if name in zeros else 0 for name in scores}
        check_patterns(self.layer_sparsity, scores, "layer sparsities")
        rules = {name: rule_of(name, self.layer_sparsity) for name in scores}
        ruled = {name: rule for name, rule in rules.items() if rule is not None}
        dense = [name for name, rule in ruled.items() if rule in (0, DENSE)]
        counts = dict.fromkeys(dense, 0)
        counts |= {n: max(round(r * scores[n].numel()), least[n]) for n, r in ruled.items() if n not in dense}
        free = {name: score for name, score in scores.items() if name not in ruled}
        if free:
            counts |= self.allocate(free, total_parameters, sum(counts.values()), least)
        elif not self.on_the_way:
            self.tell_of_missed_target(sum(counts.values()) / total_parameters)
        masks = {n: smallest_removed(s, counts[n], by_row, zeros.get(n)) for n, s in scores.items() if n not in dense}
        return Selection(masks, dict.fromkeys(dense, LEFT_DENSE))

    def tell_of_missed_target(self, reached: float) -> None:
        """Warn where rules for all the layers make another share of the parameters zero than the target."""
        if abs(reached - self.target_sparsity) >= 0.01:
            log.warning(
                "there is a sparsity of its own for every layer, and no other to make up for them: %.1f %% of all "
                "parameters become zero, not the target of %.1f %%", 100 * reached, 100 * self.target_sparsity,
            )  # fmt: skip

    def allocate(self, scores: dict[str, Tensor], total_parameters: int, already: int, least: Counts) -> Counts:
        """How many weights each of the layers without a rule loses, `least` or more; `already` go in the others."""
        removed = round(self.target_sparsity * total_parameters) - already
        if removed < 0 and not self.on_the_way:
            raise UsageError(
                f"target sparsity {self.target_sparsity:g} is out of reach: the layer sparsities alone remove "
                f"{already / total_parameters:.4f} of all parameters. Raise the target, or lower those."
            )
        removed = max(removed, sum(least[name] for name in scores))
        cap = self.cap(removed / sum(score.numel() for score in scores.values()))
        caps = {name: max(math.floor(cap * score.numel()), least[name]) for name, score in scores.items()}
        if self.max_layer_sparsity is None and removed > sum(caps.values()):  # for want of a few weights
            caps = {name: max(math.ceil(cap * score.numel()), least[name]) for name, score in scores.items()}
        if removed > sum(caps.values()):
            reach = (sum(caps.values()) + already) / total_parameters
            raise UsageError(
                f"target sparsity {self.target_sparsity:g} is out of reach: with at most {cap:g} of each of the "
                f"{len(scores)} prunable layers, {reach:.4f} of all parameters can be zero. Lower the target, or "
                f"{'raise the cap (`max_layer_sparsity`)' if cap < 1 else 'prune more layers'}."
            )
        scores = normalised(scores) if self.normalise else scores

        def split(count: int, names: list[str]) -> Counts:
            return ALLOCATIONS[self.allocation](count, {name: scores[name] for name in names}, caps)

        return with_least(split, removed, {name: least[name] for name in scores})


def smallest_removed(score: Tensor, count: int, by_row: bool = False, zero: Tensor | None = None) -> Tensor:
    """A mask that removes the `count` entries of smallest magnitude (ties: the first ones), by_row evenly from rows.

    zero: entries that are removed all the same, and before others; they count, and where a row or the whole has more
        of them than it would lose, other rows lose less.
    """
    worth = zeros_last(score, zero)
    rows = worth.flatten(1) if by_row else worth.reshape(1, -1)
    least = (rows < 0).sum(1).tolist()
    counts = with_least(even, count, dict(enumerate(least)))
    removed = torch.tensor([counts[row] for row in range(len(rows))], device="cpu").to(score.device)
    rank = rows.argsort(dim=1, stable=True).argsort(dim=1)
    mask = (rank >= removed[:, None]).view(score.shape)
    return mask if zero is None else mask & ~zero


def zeros_last(score: Tensor, zero: Tensor | None) -> Tensor:
    """The magnitudes, those of what is to be zero below all others."""
    return score.abs() if zero is None else score.abs().masked_fill(zero, -1)


@dataclass(frozen=True)
class NM:
    """Keep the N weights of largest score (or magnitude) among every M consecutive inputs.

    The inputs of a Linear are its columns; those of a convolution are its input channels, at one kernel position.

    layer_sparsity: layer name or pattern -> a pattern of its own, as "1:4", or "dense".

    Raises:
        UsageError: unless 0 < N < M.
    """

    n: int
    m: int
    layer_sparsity: Rules = field(default_factory=dict)

    def __post_init__(self):
        if not all(isinstance(number, int) for number in (self.n, self.m)):
            raise UsageError(f"N and M must be whole numbers, not {self.n!r} and {self.m!r}.")
        if not 0 < self.n < self.m:
            raise UsageError(f"N:M = {self.n}:{self.m} makes no sense: N must be at least 1 and smaller than M.")
        for pattern, rule in self.layer_sparsity.items():
            if rule != DENSE:
                self.parse(rule, f"layer sparsity of {pattern}")

    compares_layers = False  # a layer's mask is a matter of its own scores alone

    @staticmethod
    def parse(text: str, origin: str = "pattern") -> NM:
        """NM(2, 4) of "2:4"; origin: where the text comes from, for the message.

        Raises:
            UsageError: it is no N:M.
        """
        n, colon, m = text.partition(":") if isinstance(text, str) else ("", "", "")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise UsageError(f"{origin}: {text!r} is neither N:M, as '2:4', nor '{DENSE}'.")
        return NM(int(n), int(m))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{', layer rules' * bool(self.layer_sparsity)}"

    def of(self, name: str) -> NM | None:
        """The pattern of one layer; None if it stays dense."""
        rule = rule_of(name, self.layer_sparsity)
        if rule is None:
            return NM(self.n, self.m)
        return None if rule == DENSE else NM.parse(rule)

    def select(
        self, scores: dict[str, Tensor], total_parameters: int, by_row: bool = False, zeros: Masks | None = None
    ) -> Selection:
        """Masks from `scores`, (out, in, ...) of each layer, and from what goes whatever they are: `zeros`."""
        zeros = zeros or {}
        check_patterns(self.layer_sparsity, scores, "layer sparsities")
        selection = Selection()
        for name, score in scores.items():
            pattern, inputs = self.of(name), score.shape[1]
            if pattern is None:
                selection.left_dense[name] = LEFT_DENSE
            elif score.ndim > 2 and inputs == 1:
                selection.left_dense[name] = "one input channel per filter, as in depthwise convolutions"
            elif inputs % pattern.m:
                selection.left_dense[name] = f"{inputs} inputs are not a multiple of {pattern.m}"
            else:
                selection.masks[name] = pattern.mask(score, zeros.get(name))
        return selection

    def holds(self, mask: Tensor) -> bool:
        """Whether no group of a mask (out, in, ...) keeps more than N."""
        if mask.shape[1] % self.m:
            return False
        return bool((mask.movedim(1, -1).unflatten(-1, (-1, self.m)).sum(-1) <= self.n).all())

    def path(self, steps: int) -> list[NM]:
        """Patterns on the way from M:M to N:M, such as 3:4 and 2:4 before 1:4; at most `steps` of them."""
        parts = [self.part_way(i / (steps + 1)) for i in range(1, steps + 1)]
        return [part for part, before in zip(parts, [None, *parts]) if part not in (before, self)]

    def part_way(self, share: float) -> NM:
        """The pattern at a share of the way, never quite dense."""

        def part(n: int, m: int) -> NM:
            return NM(min(round(m * (n / m) ** share), m - 1), m)

        rules = {
            name: rule if rule == DENSE else str(part(NM.parse(rule).n, NM.parse(rule).m))
            for name, rule in self.layer_sparsity.items()
        }
        return replace(part(self.n, self.m), layer_sparsity=rules)

    def mask(self, score: Tensor, zero: Tensor | None = None) -> Tensor:
        """The mask of one weight from its scores (out, in, ...), `in` a multiple of M, without what is to be zero."""
        groups = zeros_last(score, zero).movedim(1, -1).unflatten(-1, (-1, self.m))  # (out, ..., in / M, M)
        kept = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
        mask = mask.flatten(-2).movedim(-1, 1).contiguous()
        return mask if zero is None else mask & ~zero


Pattern = Unstructured | NM
