"""A folder that transformers' AutoModelForImageClassification.from_pretrained(FOLDER) takes, with a model card."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from snows.deploy.card import card
from snows.deploy.checks import ReadBack
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.pt2 import weights_of
from snows.errors import SnowsError, UsageError, first_line
from snows.network.network import copied
from snows.zoo import hugging_face

log = logging.getLogger("snows")

LOAD = 'AutoModelForImageClassification.from_pretrained("THIS_FOLDER")'


def check_network(model: nn.Module) -> None:
    """Refuse networks that are not transformers' own.

    Raises:
        UsageError: it says so.
    """
    if not (hasattr(model, "config") and callable(getattr(model, "save_pretrained", None))):
        raise UsageError(
            f"only networks of the package transformers can be a folder for it, and this {type(model).__name__} is "
            f"none: export packed, pt2 or onnx."
        )


def write(deployable: Deployable, folder: Path, how: ExportOptions) -> None:
    """Write weights, config.json, README.md, and preprocessor_config.json as it is where the network came from.

    Raises:
        UsageError: the network is not one of transformers'. SnowsError: transformers cannot describe it.
    """
    check_network(deployable.model)
    model = copied(deployable.model)
    if how.half:
        model.half()
    try:
        model.save_pretrained(folder)
    except OSError:  # of the place, not of the network
        raise
    except Exception as error:
        raise SnowsError(f"transformers cannot describe this network: {first_line(error)}") from error
    try:
        processor = hugging_face.transform_of(model.name_or_path).processor
    except Exception:  # each protocol raises its own
        log.warning("%s says nothing of what becomes of images: nor does %r", folder.name, model.name_or_path)
    else:
        processor.save_pretrained(folder)
    (folder / "README.md").write_text(card(deployable.card, "transformers", LOAD))


def read(folder: Path, deployable: Deployable) -> ReadBack:
    """The network that transformers makes of the folder."""
    try:
        model = hugging_face.network_of(str(folder), pretrained=True)
    except Exception as error:
        raise SnowsError(f"transformers cannot make this network of its own folder: {first_line(error)}") from error
    return ReadBack(model.eval(), weights_of(model.state_dict()))
