"""What pruning gives back: the finished layers, one by one, and the network that they make."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from snows.network.layers import Masks
from snows.solve.solver import SolveStats

LOSSES = ("loss_before", "loss_after")
JOINT = "all layers together"  # what stands for the layers in a joint step


@dataclass(kw_only=True)
class LayerRecord(SolveStats):
    """What happened to one pruned layer: what its solution took, or its share of what the joint steps took.

    `problem` says why the layer kept its masked (or, in the joint steps, its solved) weights, if it did.
    """

    name: str
    sweep: int
    shape: tuple[int, ...]
    sparsity: float  # counted from the weight that was written
    seconds: float = 0.0
    peak_memory_bytes: int = 0  # of the device, while this layer was solved
    batch_size: int = 0  # images in the largest micro-batch, once it fitted the memory
    joint: bool = False  # solved with all the others: products and seconds are a share, the rest is of them all
    accuracy: float | None = None  # percent, of the network as it stood after this layer, where it was measured

    @classmethod
    def of(cls, values: dict) -> LayerRecord:
        """The record that JSON holds, in which what is not a number is null.

        Raises:
            TypeError, KeyError: it holds another thing.
        """
        missing = {name: float("nan") for name in LOSSES if values[name] is None}
        return cls(**{**values, **missing, "shape": tuple(values["shape"])})


@dataclass
class Step:
    """A finished layer: what is written into the network, and how it was found. A job can go on from these alone."""

    record: LayerRecord
    mask: Tensor
    weight: Tensor
    bias_update: Tensor | None = None  # (out,), added to the layer's bias, where biases are solved too
    replayed: bool = False  # finished by an earlier call, and written back instead of solved again
    fitted: bool = True  # whether its micro-batches tell what fits the memory: not where a job has changed since


@dataclass
class Pruned:
    """A pruned network and how it came about."""

    model: nn.Module  # a sparse copy of the caller's model, of the same class, on the same device
    masks: Masks
    layers: list[LayerRecord] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)  # layer name -> reason
    seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Share of all the parameters that are zero, counted."""
        return sparsity(self.model)

    @property
    def curvature_products(self) -> float:
        """Curvature products spent, in units of the whole calibration set."""
        return sum(layer.products for layer in self.layers)

    @property
    def cg_iterations(self) -> int:
        """Iterations of conjugate gradients; those of the joint steps count once."""
        joint = {layer.sweep: layer.cg_iterations for layer in self.layers if layer.joint}
        return sum(joint.values()) + sum(layer.cg_iterations for layer in self.layers if not layer.joint)

    @property
    def problems(self) -> dict[str, str]:
        """What kept its weights as they were, and why: layers, or all of them at once in the joint steps."""
        return problems(self.layers)

    @property
    def peak_memory_bytes(self) -> int:
        """The most that any layer needed."""
        return max((layer.peak_memory_bytes for layer in self.layers), default=0)


def problems(records: list[LayerRecord]) -> dict[str, str]:
    """What was not solved when it was last its turn, and why: layers, or all of them at once in the joint steps."""
    last = {JOINT if record.joint else record.name: record.problem for record in records}
    return {name: problem for name, problem in last.items() if problem}


def sparsity(model: nn.Module) -> float:
    """Share of a model's parameters that are exactly zero."""
    return sum((p == 0).sum().item() for p in model.parameters()) / sum(p.numel() for p in model.parameters())


def zeros(weight: Tensor) -> float:
    """Share of a weight's entries that are exactly zero."""
    return (weight == 0).double().mean().item()
