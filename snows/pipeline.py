"""Pruning from end to end: sweeps over the layers, each masked, solved and written back; then all of them jointly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snows.arguments import check_arguments
from snows.calibration.images import gather, mini_batches
from snows.calibration.streams import Streams
from snows.checksum import checksum
from snows.distributed import current
from snows.errors import UsageError
from snows.job import Job, Listener
from snows.masks.choose import check_selection, chosen_layers, select, without
from snows.masks.patterns import Pattern
from snows.masks.saliency import SALIENCIES, check_inputs
from snows.masks.selection import Choice, Selection, every_layer
from snows.masks.zeros import tell_of_zeros
from snows.methods import METHODS, Method
from snows.modes import own_modes, precision
from snows.network.layers import Masks
from snows.network.network import Network
from snows.options import Options
from snows.result import Pruned, Step

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


@own_modes()
def prune(
    model: nn.Module | Network,
    calibration: Tensor | Iterable,
    pattern: Pattern | Masks | Selection,
    options: Options | None = None,
    *,
    mask_alg: str = "MP",
    algo: str | Method = "SNOWS",
    layers: Callable[[str], bool] = every_layer,
    keep_zeros: bool = True,
    device: torch.device | str = "cpu",
    listener: Listener = lambda step, job: None,
    finished: Iterable[Step] = (),
) -> Pruned:
    """Prune a classifier in one shot and re-solve its surviving weights (the paper's SNOWS).

    model: any nn.Module that torch.fx can trace and that maps images to one tensor, or its trace, a `Network`, which
        is not traced again; neither is changed.
    calibration: images (n, channels, height, width), or batches of them (a DataLoader), bare or as (images, anything).
    pattern: Unstructured(...) or NM(...); or masks of your own, {layer name: boolean tensor, True where kept}, which
        stay as they are; or what `choose_masks` has chosen.
    mask_alg: which weights survive, a name in snows.masks.saliency.SALIENCIES; see there.
    algo: how the surviving weights are set: a name in snows.methods.METHODS, or a Method of your own.
    layers: which layers to prune, by name. keep_zeros: in a network that is sparse already, weights that are zero stay
        zero, and count; masks of your own decide for themselves. device: where to compute; a `Network` is on its own.
    listener: called with each finished layer's step, and the job, whose `network.model` is to be looked at only.
    finished: the steps that the listener was given by an earlier call with the same arguments, in order: they are
        written back, not solved again, and the job goes on after the last one, to the same result.

    A layer that cannot be solved (not finite, no derivative, no memory) keeps its masked weights; its record says so,
    and the job goes on. So do all where the joint steps cannot be taken.

    Where torch.distributed has a process group, all of its processes make this call with the same arguments, and share
    the work: each takes its own of the images. `finished` counts in the first of them alone. All get the same result.
    `with snows.distributed.alone():` keeps a call to one process.

    Raises:
        TraceError: the model cannot be traced.
        UsageError: an argument is none of the above, or does not fit the model; a method needs what a layer hides.
        SnowsError: what else the caller can mend; no layer at all can be solved.
        Interrupted: Ctrl-C. Unfinished: any other error, once a layer is solved. Their `result` holds what is finished.
    """
    options = Options() if options is None else options
    choice = Choice(pattern, mask_alg, layers, keep_zeros)
    check_arguments(model, choice, options, algo, device)
    started, method = time.perf_counter(), METHODS[algo] if isinstance(algo, str) else algo
    wanted = pattern if isinstance(pattern, Selection) else choice
    group = current()
    with group.together(), precision(options.precision):
        job = prepared(model, calibration, wanted, options, method, device)
        job.started, job.finished = started, group.first(finished)
        with job.kept():
            for step in steps(job):
                listener(step, job)
        return job.result()


@own_modes()
def choose_masks(
    model: nn.Module | Network,
    calibration: Tensor | Iterable | None,
    pattern: Pattern | Masks,
    options: Options | None = None,
    *,
    mask_alg: str = "MP",
    layers: Callable[[str], bool] = every_layer,
    keep_zeros: bool = True,
    device: torch.device | str = "cpu",
) -> Selection:
    """The masks of the target, chosen by the dense weights, which `prune` takes in place of a pattern.

    Its arguments, and what it raises. A schedule ends with others, and so do SparseGPT and ALPS, where layers' turns
    decide.

    calibration: None leaves the images out where magnitudes alone are compared; with them, layers whose windows do not
        compute what the network does are found, and left dense by the network that is given.
    """
    started, options = time.perf_counter(), Options() if options is None else options
    choice = Choice(pattern, mask_alg, layers, keep_zeros)
    check_arguments(model, choice, options, "MP", device)
    if isinstance(pattern, Selection):
        raise UsageError("these masks are chosen already: give a pattern, or masks as a dict.")
    with current().together(), precision(options.precision):
        network = model if isinstance(model, Network) else Network(model, device, example_of(calibration))
        streams = None
        if calibration is not None or SALIENCIES[mask_alg].score is not None:
            streams = opened(network, calibration, options.but(joint_steps=0), network.model)
        selection = select(network, choice, streams, options)
        tell_of_zeros(network, selection, choice)
        return replace(selection, seconds=time.perf_counter() - started)


def steps(job: Job) -> Iterator[Step]:
    """Each layer's step once it is written: pass after pass over the layers, and joint steps where they are due."""
    for sweep, now in enumerate(job.sweeps):
        if now.joint:
            yield from job.write_all(job.solve_jointly(sweep))
            continue
        masks = job.begin(sweep)
        for layer in job.layers_of(masks):
            mask = masks[layer.name]
            step = job.replay(layer, sweep, mask) or job.solve(layer, sweep, mask)
            job.write_back(step)
            yield step
        job.check_solved()


def prepared(
    model: nn.Module | Network,
    calibration: Tensor | Iterable,
    wanted: Choice | Selection,
    options: Options,
    method: Method,
    device: torch.device | str,
) -> Job:
    """A job before its first layer: its network, its masks, and its images if anything looks at them."""
    if isinstance(model, Network):
        network, dense_model = model.copy(), model.model
    else:
        network, dense_model = Network(model, device, example_of(calibration)), None
    chosen = wanted if isinstance(wanted, Selection) else None
    choice = check_selection(wanted, network) if isinstance(wanted, Selection) else wanted
    scoring, options = options, method.settle(options)
    saliency = SALIENCIES[choice.mask_alg]
    chosen_layers(network, choice.layers)
    selection = chosen
    if selection is None and saliency.score is None:  # what does not fit is said before an image is looked at
        selection = select(network, choice, None, scoring)
    solving = method.update is not None or options.joint_steps > 0 or saliency.choose is not None
    scores_to_come = saliency.score is not None and (selection is None or options.schedule > 0)
    streams, names = None, {layer.name for layer in network.layers}
    if solving or scores_to_come:
        streams = opened(network, calibration, options, dense_model)
    lost = names - {layer.name for layer in network.layers}  # the images showed that they cannot be followed
    choice = replace(choice, pattern=without(choice.pattern, lost))
    if selection is None or lost:
        selection = select(network, choice, streams, scoring)
    check_same(choice, selection, is_chosen=chosen is None and not isinstance(choice.pattern, dict))
    if chosen is None:
        tell_of_zeros(network, selection, choice)
    if method.inverts_inputs:
        check_inverses(method, network, selection.masks)
    if solving and streams is not None:
        inverts = saliency.choose is not None or method.inverts_inputs
        log.info(streams.outlook(selection.masks, options, inverts))
        streams.samples.tell_of_few(selection.masks, options)
    masks = {name: mask.to(network.device) for name, mask in selection.masks.items()}
    streams = streams if solving or options.schedule else None
    job = Job(network, choice, replace(selection, masks=masks), method, options, scoring, streams, current())
    job.earlier = 0.0 if chosen is None else chosen.seconds
    return job


def check_same(choice: Choice, selection: Selection, is_chosen: bool) -> None:
    """Refuse processes that were given other patterns, layers or masks than the first.

    Raises:
        SnowsError: it says which.
    """
    group = current()
    if group.size > 1 and is_chosen:
        group.check_same(pattern=repr(choice.pattern), scores=choice.mask_alg, layers=sorted(selection.masks))
    elif group.size > 1:
        group.check_same(layers=sorted(selection.masks), masks=checksum(selection.masks.values()))


def check_inverses(method: Method, network: Network, masks: Masks) -> None:
    """Refuse layers whose inputs' second moment a method cannot invert.

    Raises:
        UsageError: it lists them.
    """
    name = next((name for name, each in METHODS.items() if each is method), "the method")
    check_inputs(name, [layer for layer in network.layers if layer.name in masks], network, inverse=True)


def example_of(calibration: Any) -> Any:
    """Images for models that cannot be traced without; batches that can be drawn again are, if it comes to that."""
    if not isinstance(calibration, Iterable) or isinstance(calibration, (Tensor, Iterator)):
        return calibration if isinstance(calibration, Tensor) else None
    return lambda: gather([next(iter(calibration))])


def opened(
    network: Network, calibration: Tensor | Iterable | None, options: Options, dense_model: nn.Module | None
) -> Streams:
    """The calibration images at the start of the network, once they are known to run through it."""
    batches, group = mini_batches(network, calibration, options), current()
    if group.size > 1:
        group.check_same(
            weights=checksum(network.model.state_dict().values()),
            calibration_images=(sum(map(len, batches)), checksum(batches)),
            layers=[layer.name for layer in network.layers],
            options=options.but(cache_dir=""),
        )
    return Streams(network, batches, network.device, options, dense_model, group)
