"""Pruning from end to end: sweeps over the layers, each masked, solved and written back; then all of them jointly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from snows.arguments import check_arguments
from snows.calibration.streams import Streams, micro_batches
from snows.errors import UsageError, by_reason
from snows.job import Job, Listener
from snows.masks.choose import chosen_layers, select, without
from snows.masks.patterns import Pattern, Selection
from snows.masks.saliency import SALIENCIES, check_inputs
from snows.methods import METHODS, Method
from snows.modes import own_modes, precision
from snows.network.layers import Masks, Network
from snows.options import Options
from snows.result import Pruned, Step

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


def every_layer(name: str) -> bool:
    return True


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
    layers: which layers to prune, by name. device: where to compute; a `Network` is on its own.
    listener: called with each finished layer's step, and the job, whose `network.model` is to be looked at only.
    finished: the steps that the listener was given by an earlier call with the same arguments, in order: they are
        written back, not solved again, and the job goes on after the last one, to the same result.

    A layer that cannot be solved (not finite, no derivative, no memory) keeps its masked weights; its record says so,
    and the job goes on. So do all where the joint steps cannot be taken.

    Raises:
        TraceError: the model cannot be traced.
        UsageError: an argument is none of the above, or does not fit the model; a method needs what a layer hides.
        SnowsError: what else the caller can mend; no layer at all can be solved.
        Interrupted: Ctrl-C. Unfinished: any other error, once a layer is solved. Their `result` holds what is finished.
    """
    options = Options() if options is None else options
    check_arguments(model, pattern, options, mask_alg, algo, layers, device)
    method = METHODS[algo] if isinstance(algo, str) else algo
    wanted = pattern if isinstance(pattern, Selection) else Selection({}, {}, pattern, mask_alg, layers)
    with precision(options.precision):
        job = prepared(model, calibration, wanted, options, method, device)
        job.finished = iter(finished)
        with job.kept():
            for sweep in range(len(job.stages)):
                masks = job.begin(sweep)
                for layer in job.layers_of(masks):
                    mask = masks[layer.name]
                    step = job.replay(layer, sweep, mask) or job.solve(layer, sweep, mask)
                    job.write_back(step)
                    listener(step, job)
                job.check_solved()
            if job.options.joint_steps:
                steps = job.solve_jointly()
                for step in steps:
                    job.write_back(step)
                for step in steps:
                    listener(step, job)
        job.streams = None  # the dense network and the features go before the network is copied once more
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
    device: torch.device | str = "cpu",
) -> Selection:
    """The masks that `prune` ends at, which it takes in place of a pattern; its arguments, and what it raises.

    calibration: None leaves the images out where magnitudes alone are compared; with them, layers whose windows do not
        compute what the network does are found.
    """
    options = Options() if options is None else options
    check_arguments(model, pattern, options, mask_alg, "MP", layers, device)
    with precision(options.precision):
        network = model if isinstance(model, Network) else Network(model, device)
        wanted = Selection({}, {}, pattern, mask_alg, layers)
        return chosen(network, calibration, wanted, options, calibration is not None)[0]


def prepared(
    model: nn.Module | Network,
    calibration: Tensor | Iterable,
    wanted: Selection,
    options: Options,
    method: Method,
    device: torch.device | str,
) -> Job:
    """A job before its first layer: its network, its masks, and its images if anything looks at them."""
    options = options.but(**method.fixed)
    if method.update_jointly is None:
        options = options.but(joint_steps=0)
    network, dense_model = (model.copy(), model.model) if isinstance(model, Network) else (Network(model, device), None)
    solving = method.update is not None or SALIENCIES[wanted.mask_alg].sequential
    selection, streams = chosen(network, calibration, wanted, options, solving, dense_model)
    if method.inverts_inputs:
        name = next((name for name, each in METHODS.items() if each is method), "the method")
        check_inputs(name, [layer for layer in network.layers if layer.name in selection.masks], network)
    if solving and streams is not None:
        log.info(streams.outlook(selection.masks, options))
    return Job(network, selection, method, options, streams if solving else None)


def chosen(
    network: Network,
    calibration: Tensor | Iterable | None,
    wanted: Selection,
    options: Options,
    images: bool,
    dense_model: nn.Module | None = None,
) -> tuple[Selection, Streams | None]:
    """(the masks that are wanted, chosen unless they have been; the images, at the start of the network).

    images: whether they are looked at even if the masks are chosen without. They show which layers cannot be followed.
    """
    saliency, streams, selection = SALIENCIES[wanted.mask_alg], None, wanted
    chosen_layers(network, wanted.layers)
    if not wanted.masks and saliency.score is None:  # what does not fit is said before an image is looked at
        selection = select(network, wanted.layers, wanted.mask_alg, None, options, wanted.pattern)
    known = {layer.name for layer in network.layers}
    if images or saliency.score is not None:
        batches = micro_batches(network, calibration, options.batch_size, options.k_step)
        streams = Streams(network, batches, network.device, options, dense_model)
    lost = known - {layer.name for layer in network.layers}
    pattern = without(wanted.pattern, lost)
    if not selection.masks or (lost and not wanted.masks):
        return select(network, wanted.layers, wanted.mask_alg, streams, options, pattern), streams
    masks = {name: mask.to(network.device) for name, mask in selection.masks.items() if name not in lost}
    left_dense = {**selection.left_dense, **{name: network.refused[name] for name in lost}}
    if not masks:
        raise UsageError(f"nothing to prune: {by_reason(left_dense)}.")
    return replace(selection, masks=masks, left_dense=left_dense, pattern=pattern), streams
