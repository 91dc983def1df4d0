"""torch.export's own file, for batches of any size: what PyTorch loads without the network's class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from snows.deploy.checks import ReadBack
from snows.deploy.deployable import Deployable, ExportOptions, program


def write(deployable: Deployable, file: Path, how: ExportOptions) -> None:
    """Write the folded network."""
    torch.export.save(program(deployable, how), file)


def read(file: Path, deployable: Deployable) -> ReadBack:
    """The file, run by PyTorch, and all its weights."""
    loaded = torch.export.load(file)
    return ReadBack(loaded.module(), weights_of(loaded.state_dict))


def weights_of(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """What may be the weight of a layer: PyTorch sums over its second axis."""
    return [(name, each.float()) for name, each in state.items() if each.ndim > 1 and each.is_floating_point()]


def run_with(model: nn.Module, state: dict[str, Tensor]) -> ReadBack:
    """A network with the tensors of a file, whatever their precision."""
    model.load_state_dict(state)
    return ReadBack(model.eval(), weights_of(state))
