"""What masks are chosen by, and what comes of it: the masks, and why the other layers stay dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from snows.network.layers import Masks


def every_layer(name: str) -> bool:
    return True


@dataclass(frozen=True)
class Choice:
    """How masks are chosen: by which pattern (or the masks themselves), by whose scores, of which layers by name."""

    pattern: Any  # Pattern | Masks
    mask_alg: str = "MP"
    layers: Callable[[str], bool] = every_layer
    keep_zeros: bool = True  # what is zero already in a sparse network stays zero (snows/masks/zeros.py)


@dataclass
class Selection:
    """The masks of the layers to prune, and the reason for each layer left dense.

    choice: what chose them. A schedule goes to its pattern stage by stage, and ends with what that chooses then: masks
        that are to stay as they are go into `prune` as a dict.
    """

    masks: Masks = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    choice: Choice | None = None
    seconds: float = 0.0  # that choosing took


def are_masks(tensors: Iterable[Tensor]) -> bool:
    """Whether all the tensors hold nothing but zeros and ones."""
    return all(((tensor == 0) | (tensor == 1)).all() for tensor in tensors)
