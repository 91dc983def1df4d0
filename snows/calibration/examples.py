"""What an objective reads of the calibration images: X and the targets Y_0 .. Y_K of each micro-batch.

Both are held where there is room. Targets that find none are computed again when they are asked for: the dense
network's pass through a window costs less than to read its K + 1 features from a disk or to move them to a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snows.calibration.store import Held
from snows.calibration.stream import Stream
from snows.network.trace import Values
from snows.network.window import Window


@dataclass
class Examples:
    """The micro-batches of a window, the streams standing at its layer.

    sparse: the pruned network's stream, whose values the window reads. source: the stream that targets come from.
    teach: the dense network's features Y_0 .. Y_K of the values at the cut of `source`.
    hold: whether targets may be held at all.
    groups: the micro-batches of each mini-batch.
    """

    window: Window
    sparse: Stream
    source: Stream
    teach: Callable[[Values], list[Tensor]]
    hold: bool = True
    groups: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        self.sizes = self.sparse.sizes  # images in each micro-batch
        self.groups = self.groups or [[i] for i in range(len(self.sizes))]
        self.reads = self.window.inputs - self.window.side_inputs
        self.side: list[Held | None] = [None] * len(self.sizes)
        self.held: list[Held | None] = [None] * len(self.sizes)
        self.measured: dict[str, Tensor] = {}
        if self.window.side_inputs:
            for i in self.sparse.own:
                self.side[i] = self.sparse.store.put(self.window.compute_side_inputs(self.sparse[i]))

    def inputs(self, index: int) -> Values:
        """What the window reads for micro-batch `index`, on the device; the next one is on its way."""
        values = self.sparse.read(index, self.reads)
        self.sparse.expect(index + 1, self.reads)
        side = self.side[index]
        return self.window.enter(values if side is None else {**values, **side.get()})

    def targets(self, index: int) -> list[Tensor]:
        """Y_0 .. Y_K of micro-batch `index`, on the device."""
        held = self.held[index]
        if held is not None:
            return list(held.get().values())
        with torch.no_grad():
            values = self.source[index]
            self.source.expect(index + 1)
            targets = self.teach(values)
        if self.hold:
            self.held[index] = self.sparse.store.put(dict(enumerate(targets)), files=False)
            self.hold = self.held[index] is not None  # no room for the others either
        return targets

    def energies(self) -> Tensor:
        """(micro-batches, K + 1): || Y_k ||^2 in float64, on the host; 0 where nothing can be divided by it."""

        def energy(y: Tensor) -> Tensor:
            total = y.square().sum(dtype=torch.float64)
            smallest = torch.finfo(y.dtype).tiny ** 0.75  # of a square: products of derivatives stay numbers
            return total.where(total > y.numel() * smallest, 0.0)

        return self._of_targets("energies", energy)

    def numbers(self) -> Tensor:
        """(micro-batches, K + 1): how many numbers Y_k holds, on the host."""
        return self._of_targets("numbers", lambda y: torch.tensor(y.numel(), dtype=torch.float64))

    @torch.no_grad()
    def _of_targets(self, name: str, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """One number for each target, which the host waits for only once."""
        if name not in self.measured:
            own, depths = self.sparse.own, len(self.window.features)
            measured = torch.zeros(len(self.sizes), depths, dtype=torch.float64, device="cpu")
            if own:
                measured[own] = torch.stack([torch.stack([measure(y) for y in self.targets(i)]) for i in own]).cpu()
            self.measured[name] = self.sparse.group.sum(measured)
        return self.measured[name]
