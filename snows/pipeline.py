"""Layer by layer: mask, solve, write back, advance both streams; then all together. The only orchestration."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor, nn

from snows import arguments
from snows.calibration.streams import Streams, fitting, micro_batches
from snows.errors import Unsolvable, UsageError
from snows.job import Job
from snows.masks.patterns import NM, Pattern, Selection
from snows.masks.saliency import check_inputs, select
from snows.masks.sparsegpt import choose_mask
from snows.memory import forget_peak, peak_memory
from snows.modes import own_modes, precision
from snows.network.layers import Layer, Masks, Network
from snows.options import Options
from snows.result import LayerRecord, Pruned, Step, zeros
from snows.solve.joint import solve_jointly
from snows.solve.layer import SETTLED, Way, masked, set_layer, sparsegpt_problem
from snows.solve.solver import Solution, solve

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


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
    mask_alg: which weights survive: "MP" (magnitude), "Wanda", "SparseGPT" or "OBS"; see snows/masks/saliency.py.
    algo: how the survivors are set: "SNOWS"; "MP" (kept as they are); "MP+" (layer-wise least squares); "SparseGPT".
    layers: which layers to prune, by name; the others stay dense.
    solver: minimises one layer's objective on its support; yours, with the arguments of snows.solve.solver.solve.
    on_layer: called with each finished layer's record and the number of layers to prune.
    on_step: called with each layer just solved, to be kept, and the pruned model as it stands: the copy at work, on the
        device, to be looked at only.
    finished: the steps that `on_step` was given by an earlier call with the same arguments, in order; they are written
        back instead of solved again, and the job goes on behind the last one, to the same result.

    A layer that cannot be solved (its loss, gradient, products or solution are not finite, torch has no derivative of
    an operation behind it, or it does not fit the memory) keeps its masked (or warm-started) weights; its record says
    so, and the job goes on. So do all the layers where the joint steps cannot be taken.

    Raises:
        TraceError: the model cannot be traced.
        UsageError: an argument is none of the above; the pattern, the masks or the calibration images do not fit the
            model; a method needs what a layer hides; the solver gives back no solution; or `finished` is another's.
        SnowsError: what else the caller can mend; no layer at all can be solved.
        Interrupted: Ctrl-C. Unfinished: any other error, once a layer is solved.
            Of these and of any SnowsError, `result` holds the finished layers, the others still dense.
    """
    started, options = time.perf_counter(), Options() if options is None else options
    arguments.check(model, pattern, options, mask_alg, algo, layers, device)
    options = options.but(**SETTLED.get(algo, {}))
    with precision(options.precision):
        network, way = Network(model, device), Way(algo, solver, sequential=mask_alg == "SparseGPT")
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
        turns = len(selection.masks) * (len(stages) + (options.joint_steps > 0))
        left_dense = {**network.refused, **selection.left_dense}
        tell = lambda record: on_layer(record, turns)  # noqa: E731
        job = Job(model, network, way, iter(finished), on_step, tell, left_dense, started=started)
        if not solving:
            with job.kept():
                only_mask(job, selection.masks)
        else:
            log.info(streams().outlook(selection.masks, options))
            first = selection if stages[0] is pattern else choose(stages[0])
            with job.kept():
                layer_by_layer(job, streams(), stages, first.masks, choose, options)
            streams.cache_clear()  # the dense network and the features go before the network is copied once more
        return job.result()


def layer_by_layer(
    job: Job,
    streams: Streams,
    stages: list[Pattern | Masks],
    masks: Masks,
    choose: Callable[[Pattern | Masks], Selection],
    options: Options,
) -> None:
    """Set the layers in execution order, each on the pruned network as it stands, in a sweep for each stage.

    Behind the last, all of them but those that it could not solve are solved together, if that is asked for.

    masks: those of the first stage. A new stage's are chosen from the weights as the last one left them: its zeros,
        the smallest, stay zeros. Where they are `sequential`, they only say how many weights each layer loses; which
        ones is chosen when it is the layer's turn.
    """
    for sweep, stage in enumerate(stages):
        new = sweep == 0 or stage is not stages[sweep - 1]
        if sweep > 0:
            options = options.but(w_warm=False)
            streams.restart()
            masks = choose(stage).masks if new else masks
        for layer in (each for each in job.network.layers if each.name in masks):
            rule = how_many(layer, masks[layer.name], stage) if job.way.sequential and new else None
            set_one(job, layer, sweep, masks[layer.name], rule, streams, options)
            masks[layer.name] = job.masks[layer.name]
        job.check_solved()
    layers = [layer for layer in job.network.layers if layer.name in masks.keys() - job.failed()]
    if options.joint_steps and layers:
        set_together(job, layers, len(stages), streams, options)


def without(pattern: Pattern | Masks, refused: Iterable[str]) -> Pattern | Masks:
    """Masks without those of layers that are refused; a pattern as it is."""
    if isinstance(pattern, dict):
        return {name: mask for name, mask in pattern.items() if name not in refused}
    return pattern


def sweeps(pattern: Pattern | Masks, options: Options) -> list[Pattern | Masks]:
    """The pattern of each sweep: those on the way to the target, then the target; the caller's own masks in all."""
    on_the_way = [pattern] * options.schedule if isinstance(pattern, dict) else pattern.path(options.schedule)
    return [*on_the_way, *[pattern] * options.sweeps]


def how_many(layer: Layer, mask: Tensor, pattern: Pattern) -> NM | int:
    """What SparseGPT's mask of a layer must keep to: its N:M, or as many weights removed as `mask` removes."""
    return pattern.of(layer.name) if isinstance(pattern, NM) else int((~mask).sum())


def only_mask(job: Job, masks: Masks) -> None:
    """Apply every layer's mask, and solve nothing."""
    for layer in job.network.layers:
        if layer.name in masks:
            mask = masks[layer.name]
            weight = masked(job.network, layer, mask)
            step = Step(LayerRecord(layer.name, 0, tuple(layer.shape), zeros(weight)), mask, weight)
            job.write(layer, step)
            job.tell(step, solved=False)


def set_one(
    job: Job, layer: Layer, sweep: int, mask: Tensor, rule: NM | int | None, streams: Streams, options: Options
) -> None:
    """Set a layer, or write back what was finished of it; with a rule, its mask is to be chosen by that first."""
    step = next(job.finished, None)
    solved = step is None
    if solved:
        step = timed_step(job, layer, sweep, mask, rule, streams, options)
    else:
        check_finished(step, layer, sweep, mask if rule is None else step.mask)
        streams.recall(layer, options.k_step, step.record.batch_size if step.fitted else None)
    job.write(layer, step)
    job.tell(step, solved)


def set_together(job: Job, layers: list[Layer], sweep: int, streams: Streams, options: Options) -> None:
    """Solve all the layers at once, from their weights as they stand; a share of the effort is booked to each.

    What was finished of them is written back; where that is only some of the layers, all are solved, as they were.
    """
    finished = list(islice(job.finished, len(layers)))
    for layer, step in zip(layers, finished):
        check_finished(step, layer, sweep, job.masks[layer.name])
    steps = finished
    if len(finished) < len(layers):
        steps = [*finished, *joint_steps(job, layers, sweep, streams, options)[len(finished) :]]
    for layer, step in zip(layers, steps, strict=True):
        job.write(layer, step)
    for i, step in enumerate(steps):
        job.tell(step, solved=i >= len(finished))


def joint_steps(job: Job, layers: list[Layer], sweep: int, streams: Streams, options: Options) -> list[Step]:
    """The layers solved together; as they stand, where that cannot be done."""
    started = time.perf_counter()
    forget_peak(streams.device)
    advice = "raise --memory_budget, or do without them: --joint_steps 0"
    try:
        solution, parts = fitting(
            *(streams, "the joint steps"),
            lambda: solve_jointly(layers, job.masks, streams, job.way.solver, options),
            advice,
        )
    except Unsolvable as error:
        log.warning("the layers keep their weights: %s", error)
        weights = [masked(job.network, layer, job.masks[layer.name]) for layer in layers]
        solution, parts = Solution(weights[0], problem=error.problem), (weights, [None] * len(layers))
    share = (time.perf_counter() - started) / len(layers)
    solution.products /= len(layers)
    return [
        Step(recorded(layer, sweep, solution, weight, share, streams, joint=True), job.masks[layer.name], weight, shift)
        for layer, weight, shift in zip(layers, *parts, strict=True)
    ]


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
    job: Job, layer: Layer, sweep: int, mask: Tensor, rule: NM | int | None, streams: Streams, options: Options
) -> Step:
    """Solve a layer, in micro-batches that fit the memory, and record what it took; a rule replaces the mask."""
    started, place = time.perf_counter(), f"layer {layer.name}"
    forget_peak(streams.device)
    streams.fit(streams.plan.need([layer], options.k_step))
    try:
        if rule is not None:
            mask = fitting(streams, place, lambda: choose_mask(*sparsegpt_problem(layer, streams), rule))
        solution = fitting(streams, place, lambda: set_layer(layer, mask, streams, job.way, options))
    except Unsolvable as error:
        log.warning("layer %s keeps its masked weights: %s", layer.name, error)
        job.unsolvable = job.unsolvable or str(error)
        solution = Solution(masked(job.network, layer, mask), problem=error.problem)
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
