"""A job under way: the network at work, the one place that writes its weights, and what comes of it however it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from snows.errors import Interrupted, SnowsError, Unfinished, Unsolvable, first_line
from snows.network.layers import Layer, Masks, Network, copied
from snows.result import LayerRecord, Pruned, Step
from snows.solve.layer import Way


@dataclass
class Job:
    """What a call of `prune` has finished so far, and whom it tells.

    Besides the caller's model, a job holds the copy at work (`network.model`) and the dense network's; the copy that
    the caller gets is made when the job ends.
    """

    model: nn.Module  # the caller's
    network: Network
    way: Way
    finished: Iterator[Step]  # of an earlier call, still to be written back
    on_step: Callable[[Step, nn.Module], None]
    on_layer: Callable[[LayerRecord], None]
    left_dense: dict[str, str] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)  # of the layers that are set, on the device
    layers: list[LayerRecord] = field(default_factory=list)
    unsolvable: str = ""  # why the first of the layers that do not fit, or have no derivatives, could not be solved
    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0  # seconds that the steps took that were written back

    @torch.no_grad()
    def write(self, layer: Layer, step: Step) -> None:
        """Write a finished layer into the network; note its mask and its record."""
        weight = self.network.model.get_parameter(layer.parameter)
        weight.copy_(step.weight)
        if step.shift is not None:
            bias = self.network.model.get_parameter(layer.bias)
            bias.add_(step.shift.to(bias.device))
        self.masks[layer.name] = step.mask.to(weight.device)
        self.layers.append(step.record)

    def tell(self, step: Step, solved: bool) -> None:
        """Tell the caller of a layer that is written: solved just now, or taken from what was finished."""
        if solved:
            self.on_step(step, self.network.model)
        else:
            self.earlier += step.record.seconds
        self.on_layer(step.record)

    def failed(self) -> set[str]:
        """The layers that were not solved when it was last their turn."""
        return {name for name, problem in {each.name: each.problem for each in self.layers}.items() if problem}

    def solved(self) -> bool:
        """Whether any layer was."""
        return any(not record.problem for record in self.layers)

    def check_solved(self) -> None:
        """End the job if there is nothing to go on with.

        Raises:
            Unsolvable: none of the layers so far could be solved; the message is the first one's.
        """
        if self.unsolvable and not self.solved():
            raise Unsolvable(self.unsolvable, self.unsolvable)

    @torch.no_grad()
    def result(self) -> Pruned:
        """A plain copy of the caller's model with the layers that are set, the others dense."""
        model, masks = copied(self.model), {}
        for layer in self.network.layers:
            if layer.name in self.masks:
                for name in filter(None, (layer.parameter, layer.bias)):
                    model.get_parameter(name).copy_(self.network.model.get_parameter(name))
                masks[layer.name] = self.masks[layer.name].to(model.get_parameter(layer.parameter).device)
        seconds = self.earlier + time.perf_counter() - self.started
        return Pruned(model, masks, self.layers, self.left_dense, seconds)

    @contextmanager
    def kept(self):
        """Whatever ends the job: the error holds what is finished, if anything was solved.

        Raises:
            Interrupted: Ctrl-C. Unfinished: an error that is no SnowsError.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            raise Interrupted(f"interrupted after {len(self.layers)} layers", stop, self.result()) from None
        except SnowsError as error:
            error.result = self.result() if self.solved() else None
            raise
        except Exception as error:
            if not self.solved():
                raise
            what = f"unexpected {type(error).__name__} after {len(self.layers)} layers: {first_line(error)}"
            raise Unfinished(what, self.result()) from error
