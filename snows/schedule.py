"""What a job goes through: passes over the layers, at a rising sparsity, and the joint steps after them."""

from __future__ import annotations

from dataclasses import dataclass

from snows.masks.patterns import Pattern
from snows.network.layers import Masks
from snows.options import Options


@dataclass(frozen=True)
class Sweep:
    """One pass over the layers, or the joint steps on all of them, under one pattern.

    is_new: the pattern is another one than in the sweep before, so that masks are chosen.
    """

    pattern: Pattern | Masks
    is_new: bool = False
    joint: bool = False


def sweeps(pattern: Pattern | Masks, options: Options) -> list[Sweep]:
    """The passes over the layers: patterns on the way to the target, then the target; a caller's own masks in all."""
    on_the_way = [pattern] * options.schedule if isinstance(pattern, dict) else pattern.path(options.schedule)
    result, before = list[Sweep](), None
    for stage in [*on_the_way, *[pattern] * options.sweeps]:
        result.append(Sweep(stage, is_new=stage is not before))
        before = stage
        if options.joint_stages and options.joint_steps and stage is not pattern:
            result.append(Sweep(stage, joint=True))
    return [*result, Sweep(pattern, joint=True)] if options.joint_steps else result
