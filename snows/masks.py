"""Which weights survive: magnitude masks, unstructured or N:M.

A pattern turns the weights of the prunable layers into boolean masks (True: survives). Layers that it cannot prune it
leaves dense, and says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from snows.errors import UsageError

Masks = dict[str, Tensor]  # layer name -> boolean mask of the weight's shape, True where the weight survives


@dataclass
class Selection:
    """The masks of the layers to prune, and the reason for each layer left dense."""

    masks: Masks = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unstructured:
    """Remove the weights of smallest magnitude.

    target_sparsity: share of *all* the model's parameters (biases and norms count, but are not pruned) to set to zero.
    max_layer_sparsity: no layer loses a larger share of its weights; None: halfway between the target and 1, or, if
        too few layers may be pruned for that, halfway between the share that they must lose and 1.
    allocation: "global" compares magnitudes across layers, "uniform" gives every layer the same sparsity.

    Raises:
        UsageError: a share outside [0, 1), or a target that the cap or the unpruned parameters put out of reach.
    """

    target_sparsity: float
    max_layer_sparsity: float | None = None
    allocation: str = "global"

    def __post_init__(self):
        if not 0 <= self.target_sparsity < 1:
            raise UsageError(f"target sparsity {self.target_sparsity:g} is outside [0, 1).")
        if self.max_layer_sparsity is not None and not 0 <= self.max_layer_sparsity <= 1:
            raise UsageError(f"max layer sparsity {self.max_layer_sparsity:g} is outside [0, 1].")
        if self.allocation not in ("global", "uniform"):
            raise UsageError(f"allocation '{self.allocation}' is neither 'global' nor 'uniform'.")

    def __str__(self) -> str:
        return f"{self.target_sparsity:.0%} unstructured"

    def path(self, steps: int) -> list[Unstructured]:
        """Rising sparsities on the way to the target, the share of what is left falling evenly; `steps` of them."""
        left = 1 - self.target_sparsity
        return [replace(self, target_sparsity=1 - left ** (i / (steps + 1))) for i in range(1, steps + 1)]

    def cap(self, needed: float) -> float:
        """The largest share that one layer may lose; needed: the share that all the layers together must lose."""
        if self.max_layer_sparsity is not None:
            return self.max_layer_sparsity
        halfway = (1 + self.target_sparsity) / 2
        return halfway if needed <= halfway else min(1.0, (1 + needed) / 2)

    def select(self, weights: dict[str, Tensor], total_parameters: int) -> Selection:
        """Masks of `weights` (layer name -> weight) in a model of `total_parameters`; exact to one weight."""
        removed = round(self.target_sparsity * total_parameters)
        cap = self.cap(removed / sum(weight.numel() for weight in weights.values()))
        caps = {name: int(cap * weight.numel()) for name, weight in weights.items()}
        if removed > sum(caps.values()):
            reach = sum(caps.values()) / total_parameters
            raise UsageError(
                f"target sparsity {self.target_sparsity:g} is out of reach: with at most {cap:g} of each of the "
                f"{len(weights)} prunable layers, {reach:.4f} of all parameters can be zero. Lower the target or raise "
                f"the cap (--max_layer_sparsity)."
            )
        if self.allocation == "uniform":
            counts = proportional(removed, {name: weight.numel() for name, weight in weights.items()})
        else:
            counts = global_counts(removed, weights, caps)
        return Selection({name: smallest_removed(weight, counts[name]) for name, weight in weights.items()})


def proportional(total: int, sizes: dict[str, int]) -> dict[str, int]:
    """Split `total` in proportion to `sizes`, in whole numbers that add up to it."""
    counts, seen, given = {}, 0, 0
    for name, size in sizes.items():
        seen += size
        share = round(total * seen / sum(sizes.values()))
        counts[name], given = share - given, share
    return counts


def global_counts(removed: int, weights: dict[str, Tensor], caps: dict[str, int]) -> dict[str, int]:
    """How many weights each layer loses if the smallest of all go first and no layer loses more than its cap."""
    candidates = [weight.abs().flatten().sort().values[: caps[name]] for name, weight in weights.items()]
    layer = torch.cat([torch.full((len(c),), i) for i, c in enumerate(candidates)])
    chosen = torch.cat(candidates).argsort(stable=True)[:removed]
    counts = torch.bincount(layer[chosen.cpu()], minlength=len(weights))
    return dict(zip(weights, counts.tolist()))


def smallest_removed(weight: Tensor, count: int) -> Tensor:
    """A mask that removes the `count` entries of smallest magnitude (ties: the first ones)."""
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().argsort(stable=True)[:count]] = False
    return mask.view(weight.shape)


@dataclass(frozen=True)
class NM:
    """Keep the N weights of largest magnitude among every M consecutive inputs.

    The inputs of a Linear are its columns; those of a convolution are its input channels, at one kernel position.

    Raises:
        UsageError: unless 0 < N < M.
    """

    n: int
    m: int

    def __post_init__(self):
        if not 0 < self.n < self.m:
            raise UsageError(f"N:M = {self.n}:{self.m} makes no sense: N must be at least 1 and smaller than M.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def select(self, weights: dict[str, Tensor], total_parameters: int) -> Selection:
        """Masks of `weights` (layer name -> weight (out, in, ...)); `total_parameters` plays no part."""
        selection = Selection()
        for name, weight in weights.items():
            inputs = weight.shape[1]
            if weight.ndim > 2 and inputs == 1:
                selection.left_dense[name] = "depthwise: one input channel per filter"
            elif inputs % self.m:
                selection.left_dense[name] = f"{inputs} inputs are not a multiple of {self.m}"
            else:
                selection.masks[name] = self.mask(weight)
        return selection

    def holds(self, mask: Tensor) -> bool:
        """Whether no group of a mask (out, in, ...) keeps more than N."""
        if mask.shape[1] % self.m:
            return False
        return bool((mask.movedim(1, -1).unflatten(-1, (-1, self.m)).sum(-1) <= self.n).all())

    def path(self, steps: int) -> list[NM]:
        """Patterns on the way from M:M to N:M, such as 3:4 and 2:4 before 1:4; at most `steps` of them."""
        kept = [round(self.m * (self.n / self.m) ** (i / (steps + 1))) for i in range(1, steps + 1)]
        return [NM(n, self.m) for n in dict.fromkeys(kept) if self.n < n < self.m]

    def mask(self, weight: Tensor) -> Tensor:
        """The mask of one weight (out, in, ...), `in` a multiple of M."""
        groups = weight.abs().movedim(1, -1).unflatten(-1, (-1, self.m))  # (out, ..., in / M, M)
        kept = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
        return mask.flatten(-2).movedim(-1, 1).contiguous()


Pattern = Unstructured | NM


def given(masks: Masks, weights: dict[str, Tensor]) -> Selection:
    """The caller's own masks, checked against the prunable layers' weights.

    Raises:
        UsageError: a name that is no prunable layer, or a mask of another shape than its weight.
    """
    unknown = [name for name in masks if name not in weights]
    if unknown:
        raise UsageError(f"masks name {unknown}, which are not prunable layers; those are {list(weights)}.")
    misfits = [
        f"{name}: {tuple(mask.shape)} for a weight {tuple(weights[name].shape)}"
        for name, mask in masks.items()
        if mask.shape != weights[name].shape
    ]
    if misfits:
        raise UsageError(f"masks of the wrong shape: {'; '.join(misfits)}.")
    left_dense = {name: "no mask was given" for name in weights if name not in masks}
    return Selection({name: mask.to(weights[name].device).bool() for name, mask in masks.items()}, left_dense)
