"""The calibration images on their way through the network, held at a cut."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from snows.calibration.store import Held, Store
from snows.distributed import ALONE, Group
from snows.memory import is_gpu
from snows.network.network import Network
from snows.network.trace import Values


@dataclass(frozen=True)
class Shares:
    """The images of each micro-batch, and which of them are this process's."""

    group: Group
    sizes: list[int]  # images in each micro-batch, those of all the processes
    own: list[slice]  # which of a micro-batch's images are this process's


class Stream:
    """The calibration set at one cut of the network: what each micro-batch still needs further on.

    `advance` runs each node once for the whole job. Between its micro-batches the device holds what the store has room
    for there. Parameters are not among the values: whoever needs one reads it from the model.

    batches: the images of each micro-batch; of those that several processes share as `shared` says, this one's, which
        may be none. `own` are the micro-batches of which it has some.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        batches: list[Tensor],
        device: torch.device | str,
        store: Store | None = None,
        shared: Shares | None = None,
    ):
        self.network, self.model, self.batches, self.device = network, model, batches, device
        self.store = Store(device) if store is None else store
        self.shared = shared or Shares(ALONE, [len(batch) for batch in batches], [slice(None)] * len(batches))
        self.group, self.sizes = self.shared.group, self.shared.sizes
        self.own = [i for i, batch in enumerate(batches) if len(batch)]
        self.held: list[Held | None] = [None] * len(batches)  # None: the images themselves
        self.expected: weakref.ref[Held] | None = None
        self.cut = 1  # the position of the first node that has not run

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Values:
        """The values of a micro-batch, on the device."""
        return self.read(index)

    def read(self, index: int, nodes: set[fx.Node] | None = None) -> Values:
        """The values of a micro-batch, on the device: all, or those of some nodes."""
        held = self.held[index]
        if held is None:
            self.held[index] = held = self.store.put(self._images(index))
        return held.get(nodes)

    def expect(self, index: int, nodes: set[fx.Node] | None = None) -> None:
        """Begin to move a micro-batch's values to the device; those that were expected before are forgotten."""
        before = self.expected() if self.expected is not None else None
        if before is not None:
            before.pending = None
        held = self.held[index] if index < len(self) else None
        if held is not None:
            held.expect(nodes)
        self.expected = None if held is None else weakref.ref(held)

    @torch.no_grad()
    def advance(self, node: fx.Node) -> None:
        """Run every node before `node`, and forget what no later node reads."""
        last_use, end = self.network.last_use, self.network.position[node]
        steps = [step for step in self.network.nodes[self.cut : end] if step.op != "get_attr"]
        for i in self.own if steps else ():
            held, self.held[i] = self.held[i], None  # its room is free for what follows
            values = self._images(i) if held is None else held.get()
            del held
            self.expect(i + 1)
            for _ in self.network.walk(steps, self.model, values, {}):
                pass
            self.held[i] = self.store.put({n: v for n, v in values.items() if last_use[n] >= end})
        self.cut = end

    def _images(self, index: int) -> Values:
        return {self.network.input: channels_last_on_cpu(self.batches[index].to(self.device), self.device)}


def channels_last_on_cpu(images: Tensor, device: torch.device | str) -> Tensor:
    """Images with their channels last in memory on a CPU: convolutions keep that layout, and are faster in it."""
    return images if is_gpu(device) or images.ndim != 4 else images.to(memory_format=torch.channels_last)
