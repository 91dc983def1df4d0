"""A folder that timm.create_model("local-dir:FOLDER", pretrained=True) takes, with a model card."""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from snows.deploy.card import card
from snows.deploy.checks import ReadBack
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.pt2 import weights_of
from snows.errors import SnowsError, UsageError, first_line
from snows.network.network import copied

LOAD = 'timm.create_model("local-dir:THIS_FOLDER", pretrained=True)'


def check_network(model: nn.Module) -> None:
    """Refuse networks that timm has no name for.

    Raises:
        UsageError: it says so.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if not timm.is_model(config.get("architecture") or ""):
        raise UsageError(
            f"only networks that timm makes by a name can be a folder for it, and this {type(model).__name__} is none: "
            f"export packed, pt2 or onnx."
        )


def write(deployable: Deployable, folder: Path, how: ExportOptions) -> None:
    """Write weights, config.json and the model card, README.md.

    Raises:
        UsageError: the network is not one of timm's. SnowsError: timm cannot describe it.
    """
    check_network(deployable.model)
    model = copied(deployable.model)
    if how.half:
        model.half()
    try:
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    except OSError:  # of the place, not of the network
        raise
    except Exception as error:
        raise SnowsError(f"timm cannot describe this network: {first_line(error)}") from error
    (folder / "README.md").write_text(card(deployable.card, "timm", LOAD))


def read(folder: Path, deployable: Deployable) -> ReadBack:
    """The network that timm makes of the folder."""
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:
        raise SnowsError(f"timm cannot make this network by its name again: {first_line(error)}") from error
    return ReadBack(model.eval(), weights_of(model.state_dict()))
