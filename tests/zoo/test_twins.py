"""Networks that take the same file and compute something else."""

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from snows.cli import task
from snows.zoo.images import Data
from snows.zoo.registry import twin_of


def test_twins_are_found_among_timms_networks():
    assert twin_of("efficientnet_lite0") == "timm/tf_efficientnet_lite0"
    assert twin_of("timm/tf_efficientnet_lite0") == "timm/efficientnet_lite0"
    assert twin_of("torchvision/efficientnet_b0") is None
    assert twin_of("resnet18") is None


class Settings:
    """What is looked at of a command's settings."""

    checkpoint_key, num_classes, test_batch_size, device = None, 3, 2, "cpu"

    def __init__(self, arch, checkpoint):
        self.arch, self.checkpoint = arch, checkpoint


@pytest.mark.parametrize(("own", "other", "told"), [(50.0, 80.0, True), (80.0, 50.0, False), (None, None, False)])
def test_a_checkpoint_that_does_better_in_the_twin_is_told(tmp_path, monkeypatch, capsys, own, other, told):
    model = timm.create_model("mobilenetv3_small_075", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    images = TensorDataset(torch.zeros(2, 3, 32, 32), torch.zeros(2))
    monkeypatch.setattr(task.evaluate, "accuracy", lambda network, *_: own if network is model else other)
    task.warn_of_twin(Settings("mobilenetv3_small_075", tmp_path / "x.pt"), model, Data(images, images))
    err = capsys.readouterr().err
    assert ("x.pt also fits timm/tf_mobilenetv3_small_075, which pads otherwise: 80.0 %" in err) == told
    task.warn_of_twin(Settings("tf_efficientnet_lite0", tmp_path / "x.pt"), model, Data(images, images))
    assert capsys.readouterr().err == ""  # which does not take the file
