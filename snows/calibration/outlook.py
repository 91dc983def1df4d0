"""What a job will hold, said in a line before its first layer; or that not even one image fits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from snows.budget import LAYER_INVERSES, Budget, halved_to_fit, inverse_bytes, parts_within
from snows.calibration.plan import VECTORS, Plan
from snows.errors import SnowsError
from snows.memory import GIB
from snows.network.inputs import can_factor, moment_size
from snows.network.layers import Layer, Masks
from snows.options import Options


@dataclass
class Work:
    """What is solved at once: a layer, or all of them in the joint steps; in bytes, and images per micro-batch."""

    name: str
    need: int  # per image
    vectors: int
    images: int


def works(plan: Plan, budget: Budget, layers: list[Layer], options: Options, largest: int) -> list[Work]:
    """One for each layer, and one for the joint steps, with micro-batches of at most `largest` images."""
    groups = [(f"layer {layer.name}", [layer], options.k_step) for layer in layers]
    if options.joint_steps:
        groups.append(("all layers together, in the joint steps,", layers, len(plan.network.nodes)))
    result = []
    for name, chosen, k_step in groups:
        need = plan.need(chosen, k_step, options.curvature)
        images = halved_to_fit(largest, need, budget.shared_micro_batch)
        result.append(Work(name, need, plan.vectors(chosen), images))
    return result


def check_fits(budget: Budget, works: list[Work]) -> None:
    """Refuse a job of which not even one image fits.

    Raises:
        SnowsError: it says of what, with the numbers.
    """
    for work in works:
        if work.need + work.vectors > budget.device:
            raise SnowsError(
                f"out of memory before anything was computed: {work.name} needs about {gib(work.need)} for one image "
                f"and {gib(work.vectors)} for the solver's vectors, and {gib(budget.device)} are left besides the "
                f"networks and the images: raise `memory_budget`, lower `k_step`, or leave the joint steps out "
                f"(`joint_steps` 0)."
            )


def outlook(plan: Plan, budget: Budget, masks: Masks, options: Options, largest: int, inverts: bool) -> str:
    """A line that says what solving the layers of `masks` will hold.

    inverts: the second moments of their inputs are decomposed too, as SparseGPT and ALPS do.

    Raises:
        SnowsError: not even one image fits, or the second moments do not.
    """
    layers = [layer for layer in plan.network.layers if layer.name in masks]
    chosen = works(plan, budget, layers, options, largest)
    check_fits(budget, chosen)
    moments = plan.moments(layers) if inverts else 0
    if moments > budget.device:
        raise SnowsError(
            f"out of memory before anything was computed: the second moments of the widest layer's inputs take "
            f"{gib(moments)}, and {gib(budget.device)} are left: raise `memory_budget`, or choose masks otherwise."
        )
    streams = (2 if options.targets == "dense" else 1) * plan.images * max(map(plan.held_at, layers))
    targets = plan.images * max(plan.targets(layer, options.k_step) for layer in layers)
    inverses, factors = preconditioners(plan, budget, {layer: masks[layer.name] for layer in layers}, options)
    moments = max(moments, factors)
    theta = max(work.vectors for work in chosen) // VECTORS
    steps = max(options.joint_steps, options.newton_steps)
    recycled = 4 * theta * budget.recycled(options.recycle, theta) if steps > 1 else 0
    in_files = f" (what exceeds {gib(budget.room)} in files)" if streams > budget.room else ""
    again = " (computed again where they find no room)" if streams + targets > budget.room else ""
    sizes = sorted({work.images for work in chosen})
    images = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    mixed = ", mixtures among them," if options.mixtures else ""
    return (
        f"memory: {gib(budget.device)} to use; {plan.images} images{mixed} take up to {gib(streams)} on their "
        f"way{in_files} and {gib(targets)} of targets{again}; a micro-batch of {images} images "
        f"{gib(max(work.need * work.images for work in chosen))}; the solver's vectors "
        f"{gib(VECTORS * theta)}, inverses {gib(inverses)}, products of earlier steps {gib(recycled)}"
        f"{f', second moments of inputs {gib(moments)}' if moments else ''}"
    )


def preconditioners(plan: Plan, budget: Budget, masks: dict[Layer, Tensor], options: Options) -> tuple[int, int]:
    """Bytes of the inverses that are held at once, and of the second moments that they are made of."""
    layers = [layer for layer in masks if can_factor(plan.network, layer)]
    if options.preconditioner == "none" or not layers:
        return 0, 0
    size = next(plan.network.model.parameters()).element_size()
    inverses = [min(LAYER_INVERSES, inverse_bytes(masks[layer], size)) for layer in layers]
    moments = [moment_size(layer, ones=True) * size for layer in layers]
    if not options.joint_steps:
        return min(max(inverses), budget.layer_inverses), max(moments)
    parts = parts_within(moments, budget.all_inverses)
    return min(sum(inverses), budget.all_inverses), max(sum(moments[part]) for part in parts)


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
