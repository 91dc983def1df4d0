"""A job under way: what `prune` has finished, the one place that writes weights, and what comes of it at any end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from snows.calibration.retry import retry_on_out_of_memory
from snows.calibration.streams import Streams
from snows.distributed import Group
from snows.errors import Interrupted, SnowsError, Unfinished, Unsolvable, UsageError, first_line
from snows.masks.choose import mask_rule, select
from snows.masks.patterns import NM
from snows.masks.saliency import SALIENCIES
from snows.masks.selection import Choice, Selection
from snows.masks.zeros import kept_zeros
from snows.memory import forget_peak, peak_memory
from snows.methods import Method, layer_problem
from snows.network.layers import Layer, Masks
from snows.network.network import Network, copied
from snows.options import Options
from snows.result import JOINT, LayerRecord, Pruned, Step, problems, zeros
from snows.schedule import sweeps
from snows.solve.layer import Update
from snows.solve.solver import SolveStats

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

Listener = Callable[[Step, "Job"], None]  # told of every layer that is written, and of the job as it stands


@dataclass
class Job:
    """What a call of `prune` works on, and what it has finished so far.

    Besides the caller's model, a job holds the copy at work (`network.model`) and the dense network's; the copy that
    the caller gets is made when the job ends.
    """

    network: Network
    choice: Choice
    selection: Selection  # the target's masks
    method: Method
    options: Options
    scoring: Options  # the caller's, which masks are chosen with whatever the method
    streams: Streams | None  # None: nothing looks at images
    group: Group  # the processes that share the images
    finished: Iterator[Step] = field(default_factory=lambda: iter(()))  # of an earlier call, still to be written back
    masks: Masks = field(default_factory=dict)  # of the layers that are set, on the device
    layers: list[LayerRecord] = field(default_factory=list)
    unsolvable: str = ""  # why the first of the layers that do not fit, or have no derivatives, could not be solved
    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0  # seconds that replayed steps, and masks chosen before, took

    def __post_init__(self):
        self.sweeps = sweeps(self.choice.pattern, self.options)
        saliency = SALIENCIES[self.choice.mask_alg]
        self.choose = saliency.choose
        self.is_scored = saliency.score is not None and not isinstance(self.choice.pattern, dict)
        self.turns = len(self.selection.masks) * len(self.sweeps)

    def begin(self, sweep: int) -> Masks:
        """The masks of a sweep over the layers, the streams at the start of the network.

        A new stage's are chosen from the weights as the last one left them: its zeros, the smallest, stay zeros. Where
        a layer's turn decides, these only say how many weights it loses.
        """
        stage = self.sweeps[sweep].pattern
        if sweep > 0 and self.streams is not None:
            self.options = self.options.but(w_warm=False)
            self.streams.restart()
        if not self.sweeps[sweep].is_new:
            return dict(self.masks)
        masks = self.selection.masks
        if sweep > 0 or stage is not self.choice.pattern:
            masks = select(self.network, replace(self.choice, pattern=stage), self.streams, self.scoring).masks
        return {name: self.group.agree(mask) for name, mask in masks.items()}

    def layers_of(self, names: Collection[str]) -> list[Layer]:
        """The layers of these names, in execution order."""
        return [layer for layer in self.network.layers if layer.name in names]

    def replay(self, layer: Layer, sweep: int, mask: Tensor) -> Step | None:
        """What an earlier call finished of a layer, if it did; the streams pass over it."""
        step = next(self.finished, None)
        if step is None:
            return None
        # Images choose some masks, and round otherwise in other micro-batches or on another device.
        seen = self.sweeps[sweep].is_new and (self.choose is not None or self.is_scored)
        check_finished(step, layer, sweep, step.mask if seen else mask)
        if self.streams is not None:
            self.streams.recall([layer], self.options, step.record.batch_size if step.fitted else None)
        return replace(step, replayed=True)

    def solve(self, layer: Layer, sweep: int, mask: Tensor) -> Step:
        """A layer's mask and its surviving weights, in micro-batches that fit the memory, and what that took."""
        streams, place, started = self.streams, f"layer {layer.name}", time.perf_counter()
        if streams is None:
            return self._step(layer, sweep, mask, Update(self.network.masked(layer, mask)), 0.0)
        forget_peak(streams.device)
        problem = ""
        try:
            streams.fit_layer(layer, self.options)
            mask = self._chosen(layer, sweep, mask, place)
            if self.method.update is not None:
                for attempt in retry_on_out_of_memory(streams, place):
                    with attempt:
                        update = self.method.update(layer, mask, streams, self.options)
                return self._step(layer, sweep, mask, update, time.perf_counter() - started)
        except Unsolvable as error:
            said = str(error)  # of the error itself, the log's record would hold the frames
            log.warning("layer %s keeps its masked weights: %s", layer.name, said)
            problem, self.unsolvable = error.problem, self.unsolvable or str(error)
        update = Update(self.network.masked(layer, mask), stats=SolveStats(problem=problem))
        return self._step(layer, sweep, mask, update, time.perf_counter() - started)

    def solve_jointly(self, sweep: int) -> list[Step]:
        """All the layers that could be solved, at once, from their weights as they stand; as they stand if that fails.

        What was finished of them is taken over; where that is only some of the layers, all are solved anew: those would
        not fit the others of a solution in other micro-batches.
        """
        layers = self.layers_of(self.masks.keys() - self.failed())
        streams, update_jointly = self.streams, self.method.update_jointly
        if not layers or streams is None or update_jointly is None:
            return []
        finished = list(islice(self.finished, len(layers)))
        for layer, step in zip(layers, finished):
            check_finished(step, layer, sweep, self.masks[layer.name])
        if len(finished) == len(layers):
            fitted = finished[0].record.batch_size if finished[0].fitted else None
            streams.recall(layers, self.options, fitted, joint=True)
            return [replace(step, replayed=True) for step in finished]
        started = time.perf_counter()
        forget_peak(streams.device)
        streams.fit_jointly(layers, self.options)
        advice = "raise `memory_budget`, or do without them: `joint_steps` 0"
        try:
            for attempt in retry_on_out_of_memory(streams, "the joint steps", advice):
                with attempt:
                    updates = update_jointly(layers, self.masks, streams, self.options)
        except Unsolvable as error:
            log.warning("the layers keep their weights: %s", str(error))
            stats = SolveStats(problem=error.problem)
            updates = [Update(self.network.masked(layer, self.masks[layer.name]), stats=stats) for layer in layers]
        seconds = (time.perf_counter() - started) / len(layers)
        for update in updates:  # a share of the effort is booked to each
            update.stats = replace(update.stats, products=update.stats.products / len(layers))
        return [
            self._step(layer, sweep, self.masks[layer.name], update, seconds, joint=True)
            for layer, update in zip(layers, updates)
        ]

    @torch.no_grad()
    def write_back(self, step: Step) -> None:
        """Write a finished layer into the network; note its mask and its record."""
        layer = next(each for each in self.network.layers if each.name == step.record.name)
        weight = self.network.model.get_parameter(layer.parameter)
        weight.copy_(step.weight)
        if step.bias_update is not None and layer.bias is not None:
            bias = self.network.model.get_parameter(layer.bias)
            bias.add_(step.bias_update.to(bias.device))
        self.masks[layer.name] = step.mask.to(weight.device)
        self.layers.append(step.record)
        self.earlier += step.record.seconds if step.replayed else 0.0

    def write_all(self, steps: list[Step]) -> Iterator[Step]:
        """Write steps back, and give them one by one to be told of: their weights are not kept longer than that."""
        for step in steps:
            self.write_back(step)
        while steps:
            yield steps.pop(0)

    def failed(self) -> set[str]:
        """The layers that were not solved when it was last their turn."""
        return problems(self.layers).keys() - {JOINT}

    def check_solved(self) -> None:
        """End the job if there is nothing to go on with.

        Raises:
            Unsolvable: none of the layers so far could be solved; the message is the first one's.
        """
        if self.unsolvable and not self._solved():
            raise Unsolvable(self.unsolvable, self.unsolvable)

    @torch.no_grad()
    def result(self) -> Pruned:
        """A plain copy of the caller's model with the layers that are set, the others dense."""
        self.streams = None  # the dense network and the features go before the network is copied once more
        model, masks = copied(self.network.original), {}
        for layer in self.layers_of(self.masks):
            for name in filter(None, (layer.parameter, layer.bias)):
                model.get_parameter(name).copy_(self.network.model.get_parameter(name))
            masks[layer.name] = self.masks[layer.name].to(model.get_parameter(layer.parameter).device)
        left_dense = {**self.network.refused, **self.selection.left_dense}
        return Pruned(model, masks, self.layers, left_dense, self.earlier + time.perf_counter() - self.started)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the job: the error holds what is finished, if anything was solved.

        Raises:
            Interrupted: Ctrl-C. Unfinished: an error that is no SnowsError.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            raise Interrupted(f"interrupted after {len(self.layers)} layers", stop, self.result()) from None
        except SnowsError as error:
            error.result = self.result() if self._solved() else None
            raise
        except Exception as error:
            if not self._solved():
                raise
            what = f"unexpected {type(error).__name__} after {len(self.layers)} layers: {first_line(error)}"
            raise Unfinished(what, self.result()) from error

    def _chosen(self, layer: Layer, sweep: int, mask: Tensor, place: str) -> Tensor:
        """A layer's mask where its turn decides; else `mask`."""
        streams, rule = self.streams, self._mask_rule(layer, sweep, mask)
        if streams is None or self.choose is None or rule is None:
            return mask
        for attempt in retry_on_out_of_memory(streams, place):
            with attempt:
                weight, moment = layer_problem(layer, streams)
                zero = kept_zeros(self.network, [layer], self.choice).get(layer.name)
                if not streams.samples.solvable(layer, mask, self.options).any():
                    zero = weight == 0  # of an earlier sweep's too: nothing would bring them back
                chosen = self.choose(weight, moment, rule, zero)
        return self.group.agree(chosen)

    def _mask_rule(self, layer: Layer, sweep: int, mask: Tensor) -> NM | int | None:
        """What a mask that is chosen when it is the layer's turn must keep to; None: the mask is final."""
        now = self.sweeps[sweep]
        return mask_rule(layer, mask, now.pattern) if self.choose and now.is_new else None

    def _solved(self) -> bool:
        return any(not record.problem for record in self.layers)

    def _step(
        self, layer: Layer, sweep: int, mask: Tensor, update: Update, seconds: float, joint: bool = False
    ) -> Step:
        """A finished layer, the same in all the processes: what each of them rounds otherwise does not add up."""
        group, bias_update = self.group, update.bias_update
        weight = group.agree(update.weight)  # the mask is the same already: `begin`, `_chosen`
        record = LayerRecord(
            **vars(update.stats),
            name=layer.name,
            sweep=sweep,
            shape=tuple(layer.shape),
            sparsity=zeros(weight),
            seconds=seconds,
            peak_memory_bytes=0 if self.streams is None else -group.least(-peak_memory(self.network.device)),
            batch_size=0 if self.streams is None else self.streams.batch_size,
            joint=joint,
        )
        return Step(group.agree(record), mask, weight, None if bias_update is None else group.agree(bias_update))


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
