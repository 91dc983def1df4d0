"""Layer by layer: mask, solve, write back, advance both streams; then all together. The only orchestration."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor, nn

from snows import arguments
from snows.calibration import Streams, fitting, micro_batches
from snows.errors import Interrupted, UsageError
from snows.graph import Layer, Network
from snows.joint import solve_jointly
from snows.masks import NM, Masks, Pattern, Selection
from snows.memory import forget_peak, peak_memory
from snows.modes import own_modes
from snows.options import Options
from snows.result import Group, LayerRecord, Pruned, Step, zeros
from snows.scores import check_inputs, select
from snows.solver import Solution, solve
from snows.sparsegpt import choose_mask
from snows.survivors import SETTLED, Way, masked, set_layer, sparsegpt_problem

log = logging.getLogger("snows")


@own_modes()
def prune(
    model: nn.Module,
    calibration: Tensor | Iterable,
    pattern: Pattern | Masks,
    options: Options | None = None,
    *,
    mask_alg: str = "MP",
    algo: str = "SNOWS",
    layers: Callable[[str], bool] = lambda name: True,
    solver: Callable[..., Solution] = solve,
    device: torch.device | str = "cpu",
    on_layer: Callable[[LayerRecord, int], None] = lambda record, layers: None,
    on_step: Callable[[Step, nn.Module], None] = lambda step, model: None,
    finished: Iterable[Step] = (),
) -> Pruned:
    """Prune a classifier in one shot and re-solve its surviving weights (the paper's SNOWS).

    model: any nn.Module that torch.fx can trace and that maps images to one tensor; it is not changed.
    calibration: images (n, channels, height, width) as the model wants them, or an iterable (a DataLoader) of such
        batches, bare or as (images, anything).
    pattern: Unstructured(...) or NM(...), or masks of your own: {layer name: boolean tensor, True where kept}, which
        stay as they are (options.schedule adds passes with the same masks).
    mask_alg: which weights survive: "MP" (magnitude), "Wanda", "SparseGPT" or "OBS"; see snows/scores.py.
    algo: how the survivors are set: "SNOWS"; "MP" (kept as they are); "MP+" (layer-wise least squares); "SparseGPT".
    layers: which layers to prune, by name; the others stay dense.
    solver: minimises one layer's objective on its support; yours, with the arguments of snows.solver.solve.
    on_layer: called with each finished layer's record and the number of layers to prune.
    on_step: called with each layer just solved, to be kept, and the pruned model as it stands.
    finished: the steps that `on_step` was given by an earlier call with the same arguments, in order; they are written
        back instead of solved again, and the job goes on behind the last one, to the same result.

    A layer whose loss, gradient, products or solution are not finite keeps its masked (or warm-started) weights; its
    record says so, and the job goes on.

    Raises:
        TraceError: the model cannot be traced.
        UsageError: an argument is none of the above; the pattern, the masks or the calibration images do not fit the
            model; a method needs what a layer hides; or `finished` is another's.
        Interrupted: Ctrl-C; its `result` holds the finished layers, the others still dense.
    """
    started = time.perf_counter()
    options, earlier = Options() if options is None else options, 0.0
    arguments.check(model, pattern, options, mask_alg, algo, layers, device)
    options = options.but(**SETTLED.get(algo, {}))
    network = Network(model, device)
    batches = partial(micro_batches, network, calibration, options.batch_size, options.k_step)
    streams = cache(lambda: Streams(network, batches(), device, options))
    choose = partial(select, network, layers, mask_alg, streams, options)
    selection, solving = choose(pattern), algo != "MP" or mask_alg == "SparseGPT"
    if solving:
        streams()  # the images show which layers cannot be followed
        if selection.masks.keys() & network.refused.keys():
            pattern = without(pattern, network.refused)
            selection = choose(pattern)
    stages = sweeps(pattern, options)
    if algo == "SparseGPT":
        check_inputs(algo, [layer for layer in network.layers if layer.name in selection.masks], network)
    if not solving:
        steps = masked_only(network, selection.masks)
    else:
        log.info(streams().outlook(selection.masks, options))
        way = Way(algo, solver, sequential=mask_alg == "SparseGPT")
        first = selection if stages[0] is pattern else choose(stages[0])
        steps = layer_by_layer(streams(), stages, first.masks, choose, way, options, iter(finished))
    result = Pruned(copy.deepcopy(model), {}, left_dense={**network.refused, **selection.left_dense})
    try:
        for group in steps:
            for layer, step, _ in group:
                write_back(layer, step, network, result)
            for _, step, solved in group:
                if solved:
                    on_step(step, result.model)
                else:
                    earlier += step.record.seconds
                on_layer(step.record, len(selection.masks) * (len(stages) + (options.joint_steps > 0)))
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted after {len(result.layers)} layers", stop, result) from None
    finally:
        result.seconds = earlier + time.perf_counter() - started
    return result


def without(pattern: Pattern | Masks, refused: Iterable[str]) -> Pattern | Masks:
    """Masks without those of layers that are refused; a pattern as it is."""
    if isinstance(pattern, dict):
        return {name: mask for name, mask in pattern.items() if name not in refused}
    return pattern


def sweeps(pattern: Pattern | Masks, options: Options) -> list[Pattern | Masks]:
    """The pattern of each sweep: those on the way to the target, then the target; the caller's own masks in all."""
    on_the_way = [pattern] * options.schedule if isinstance(pattern, dict) else pattern.path(options.schedule)
    return [*on_the_way, *[pattern] * options.sweeps]


def masked_only(network: Network, masks: Masks) -> Iterator[Group]:
    """Every layer with its mask applied and nothing solved."""
    for layer in network.layers:
        if layer.name in masks:
            mask = masks[layer.name]
            weight = masked(network, layer, mask)
            yield [(layer, Step(LayerRecord(layer.name, 0, tuple(layer.shape), zeros(weight)), mask, weight), False)]


def layer_by_layer(
    streams: Streams,
    stages: list[Pattern | Masks],
    masks: Masks,
    choose: Callable[[Pattern | Masks], Selection],
    way: Way,
    options: Options,
    finished: Iterator[Step],
) -> Iterator[Group]:
    """Set the layers in execution order, each on the pruned network as it stands, in a sweep for each stage.

    Behind the last, all of them but those that could not be solved are solved together, if that is asked for.

    masks: those of the first stage. A new stage's are chosen from the weights as the last one left them: its zeros,
        the smallest, stay zeros. Where they are `sequential`, they only say how many weights each layer loses; which
        ones is chosen when it is the layer's turn.

    Yields the layers that were set at a time. The caller writes the new weights back before it asks for the next.
    """
    failed = set()
    for sweep, stage in enumerate(stages):
        new = sweep == 0 or stage is not stages[sweep - 1]
        if sweep > 0:
            options = options.but(w_warm=False)
            streams.restart()
            masks = choose(stage).masks if new else masks
        for layer in (each for each in streams.network.layers if each.name in masks):
            mask, step = masks[layer.name], next(finished, None)
            rule = how_many(layer, mask, stage) if way.sequential and new else None
            solved = step is None
            if solved:
                step = timed_step(layer, sweep, mask, rule, streams, way, options)
            else:
                check_finished(step, layer, sweep, mask if rule is None else step.mask)
                streams.recall(layer, options.k_step, step.record.batch_size if step.fitted else None)
            masks[layer.name] = step.mask
            failed |= {layer.name} if step.record.problem else set()
            yield [(layer, step, solved)]
    layers = [layer for layer in streams.network.layers if layer.name in masks.keys() - failed]
    if options.joint_steps and layers:
        yield together(layers, masks, streams, way.solver, options, len(stages), list(islice(finished, len(layers))))


def together(
    layers: list[Layer],
    masks: Masks,
    streams: Streams,
    solver: Callable[..., Solution],
    options: Options,
    sweep: int,
    finished: list[Step],
) -> Group:
    """Solve all the layers at once, from their weights as they stand; a share of the effort is booked to each.

    finished: where it holds only some of the layers, all of them are solved again, to the same weights.
    """
    for layer, step in zip(layers, finished):
        check_finished(step, layer, sweep, masks[layer.name])
    if len(finished) == len(layers):
        return [(layer, step, False) for layer, step in zip(layers, finished)]
    started = time.perf_counter()
    forget_peak(streams.device)
    solution, parts = fitting(
        streams, "the joint steps", lambda: solve_jointly(layers, masks, streams, solver, options)
    )
    share = (time.perf_counter() - started) / len(layers)
    solution.products /= len(layers)
    group = []
    for i, (layer, weight, shift) in enumerate(zip(layers, *parts, strict=True)):
        record = recorded(layer, sweep, solution, weight, share, streams, joint=True)
        step = Step(record, masks[layer.name], weight, shift)
        group.append((layer, *((finished[i], False) if i < len(finished) else (step, True))))
    return group


def how_many(layer: Layer, mask: Tensor, pattern: Pattern) -> NM | int:
    """What SparseGPT's mask of a layer must keep to: its N:M, or as many weights removed as `mask` removes."""
    return pattern.of(layer.name) if isinstance(pattern, NM) else int((~mask).sum())


def check_finished(step: Step, layer: Layer, sweep: int, mask: Tensor) -> None:
    """Refuse a finished layer of another job.

    Raises:
        UsageError: it is another layer, or has another mask than this job would give it.
    """
    record = step.record
    if (record.name, record.sweep) != (layer.name, sweep) or not step.mask.to(mask.device).equal(mask):
        raise UsageError(
            f"cannot go on: layer {layer.name} (sweep {sweep + 1}) is due, with its mask, and layer {record.name} "
            f"(sweep {record.sweep + 1}) is what was finished, or its mask differs. The network, its weights or the "
            f"masks are not those that the run began with."
        )


def timed_step(
    layer: Layer, sweep: int, mask: Tensor, rule: NM | int | None, streams: Streams, way: Way, options: Options
) -> Step:
    """Set a layer, in micro-batches that fit the memory, and record what it took; a rule replaces the mask."""
    started = time.perf_counter()
    forget_peak(streams.device)
    if rule is not None:
        mask = fitting(streams, f"layer {layer.name}", lambda: choose_mask(*sparsegpt_problem(layer, streams), rule))
    solution = fitting(streams, f"layer {layer.name}", lambda: set_layer(layer, mask, streams, way, options))
    record = recorded(layer, sweep, solution, solution.weight, time.perf_counter() - started, streams)
    return Step(record, mask, solution.weight, solution.shift)


def recorded(
    layer: Layer, sweep: int, solution: Solution, weight: Tensor, seconds: float, streams: Streams, joint: bool = False
) -> LayerRecord:
    """What a solution took, for the layer whose new weight is given."""
    return LayerRecord(
        layer.name,
        sweep,
        tuple(layer.shape),
        zeros(weight),
        solution.loss_before,
        solution.loss_after,
        solution.newton_steps,
        solution.cg_iterations,
        solution.products,
        seconds,
        peak_memory(streams.device),
        streams.batch_size,
        solution.residuals,
        solution.problem,
        joint,
    )


@torch.no_grad()
def write_back(layer: Layer, step: Step, network: Network, result: Pruned) -> None:
    """Write a finished layer into the network at work and the result's model; note its mask and its record."""
    for model in (network.model, result.model):
        model.get_parameter(layer.parameter).copy_(step.weight)
        if step.shift is not None:
            bias = model.get_parameter(layer.bias)
            bias.add_(step.shift.to(bias.device))
    result.masks[layer.name] = step.mask.to(result.model.get_parameter(layer.parameter).device)
    result.layers.append(step.record)
