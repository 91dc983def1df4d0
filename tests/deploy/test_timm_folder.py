"""Folders for timm: written, taken by its create_model and by --arch, and refused for networks that it cannot make."""

import pytest
import timm
import torch
from torch import nn

import snows
from snows.deploy import timm_folder
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.exports import export
from snows.errors import SnowsError, UsageError
from snows.zoo.classifiers import from_library


@pytest.fixture
def efficientnet():
    """One of timm's small networks, pruned, of three classes and with a mean of its own."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    pruned = snows.prune(model.eval(), None, snows.Unstructured(0.5), algo="MP")
    pruned.model.pretrained_cfg = {**pruned.model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    images = torch.randn(3, 3, 32, 32)
    card = {"network": "test_efficientnet", "pattern": "50% unstructured", "accuracy": "81.20 %"}
    return Deployable(
        pruned.model, pruned.masks, lambda: [(images, torch.tensor([0, 1, 2]))], lambda: images, None, card
    )


def test_timm_and_arch_take_the_folder(efficientnet, tmp_path):
    folder = tmp_path / "timm"
    found = export(efficientnet, "timm", folder)
    assert found.largest_difference == 0
    assert found.nm_layers is None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in efficientnet.model.state_dict().items())
    card = (folder / "README.md").read_text()
    for text in ("library_name: timm", "50% unstructured", "81.20 %", "lucas2025preserving"):
        assert text in card

    classifier = from_library(f"local-dir:{folder}", pretrained=True)
    assert classifier.model.state_dict()["conv_stem.weight"].equal(model.state_dict()["conv_stem.weight"])
    assert tuple(classifier.transform.transforms[-1].mean.tolist()) == pytest.approx((0.1, 0.2, 0.3))
    assert from_library(f"local-dir:{folder}", pretrained=False).model.num_classes == 3

    export(efficientnet, "timm", folder, ExportOptions(half=True))  # in the place of the first
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).conv_stem.weight.equal(
        efficientnet.model.conv_stem.weight.half().float()
    )


def test_networks_that_timm_has_no_name_for_are_refused(deployable, tmp_path):
    with pytest.raises(UsageError, match=r"only networks that timm makes by a name .*, and this Small is none: export"):
        export(deployable, "timm", tmp_path / "timm")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_was_changed_since_timm_made_it_is_refused(efficientnet, tmp_path):
    efficientnet.model.conv_stem = nn.Conv2d(3, efficientnet.model.conv_stem.out_channels, 5, 2, 2, bias=False)
    with pytest.raises(SnowsError, match="timm: timm cannot make this network by its name again: "):
        export(efficientnet, "timm", tmp_path / "timm")


def test_what_timm_cannot_describe_is_told(efficientnet, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("Model argument 'x' is not serializable")

    monkeypatch.setattr(timm_folder.timm.models, "save_for_hf", fails)
    with pytest.raises(SnowsError, match="timm: timm cannot describe this network: Model argument 'x'"):
        export(efficientnet, "timm", tmp_path / "timm")


def test_a_network_of_the_hub_is_asked_of_timm(monkeypatch):
    asked = []
    made = timm.create_model("test_vit", num_classes=2)
    monkeypatch.setattr(timm, "create_model", lambda name, **how: asked.append((name, how)) or made)
    assert from_library("hf-hub:owner/some_model", pretrained=True, num_classes=2).model is made
    assert asked == [("hf-hub:owner/some_model", {"pretrained": True, "num_classes": 2})]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SnowsError, match=r"there is no folder .*nowhere"):
        from_library(f"local-dir:{tmp_path / 'nowhere'}", pretrained=True)
