"""Exports that need PyTorch and timm alone: what they hold, and what is refused, leaving no file behind."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from helpers import ROOT
from torch import nn

import snows
from snows.deploy import checks, exports, int8, packages, pt2
from snows.deploy.backends import BACKENDS
from snows.deploy.deployable import ExportOptions, what_is_left
from snows.deploy.exports import export
from snows.errors import SnowsError, UsageError, WriteError


def same(one, other):
    return all(tensor.equal(other.state_dict()[name]) for name, tensor in one.state_dict().items())


def checked(deployable):
    """The check of a network beside itself."""
    read = checks.ReadBack(deployable.model, pt2.weights_of(deployable.model.state_dict()))
    return checks.check(
        deployable, checks.Logits(deployable.model, deployable), read, deployable.weights(deployable.model), []
    )


def test_a_folded_network_computes_the_same_without_its_batchnorm(deployable):
    images = deployable.example
    folded = deployable.folded
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), deployable.model(images))
    assert (folded.stem.weight == 0).equal(deployable.model.stem.weight == 0)
    assert any(isinstance(module, nn.BatchNorm2d) for module in deployable.model.modules())


def test_what_timms_norms_do_besides_is_left():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.Sigmoid)
    x = torch.randn(2, 4, 3, 3)
    assert what_is_left(norm)(x).equal(torch.sigmoid(x))
    assert what_is_left(nn.BatchNorm2d(4))(x).equal(x)


def test_pt2_holds_the_network_for_any_batch(deployable, tmp_path):
    found = export(deployable, "pt2", tmp_path / "model.pt2")
    assert found.largest_difference < 1e-5
    assert (found.same_class, found.images) == (5, 5)
    assert found.accuracy == found.accuracy_before
    assert found.zeros_asked == found.zeros_found == sum(int((~mask).sum()) for mask in deployable.masks.values())
    assert (found.layers, found.nm_layers) == (4, 4)
    assert found.bytes == (tmp_path / "model.pt2").stat().st_size
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 2, 7):
        assert loaded(torch.randn(size, 4, 6, 6)).shape == (size, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_packed_is_the_network_bit_for_bit(deployable, tmp_path):
    found = export(deployable, "packed", tmp_path / "packed.safetensors")
    assert found.largest_difference == 0
    model, masks = snows.load_run(tmp_path, copy.deepcopy(deployable.model))
    assert same(model, deployable.model)
    assert all(masks[name].equal(mask) for name, mask in deployable.masks.items())


def test_half_is_smaller_and_a_little_off(deployable, tmp_path):
    out = tmp_path / "packed.safetensors"
    whole, half = (export(deployable, "packed", out, ExportOptions(half=half)) for half in (False, True))
    assert half.bytes < whole.bytes
    assert whole.largest_difference == 0 < half.largest_difference < 0.01
    assert half.zeros_found == half.zeros_asked


def test_half_computes_in_fp16_and_takes_and_gives_float32(deployable, tmp_path):
    found = export(deployable, "pt2", tmp_path / "model.pt2", ExportOptions(half=True))
    assert 1e-6 < found.largest_difference < 0.01
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float16}
    assert loaded.module()(deployable.example).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weight: weight + 1e-3, r"pt2: zeros are lost in stem \(144 of 144\), grouped"),
        (lambda weight: -weight, "pt2: no linear map or convolution in the file has the weights of stem, grouped"),
    ],
)
def test_lost_zeros_are_refused_and_leave_no_file(deployable, tmp_path, monkeypatch, change, told):
    read = pt2.read

    def damaged(file, deployable):
        back = read(file, deployable)
        return checks.ReadBack(back.run, [(name, change(weight)) for name, weight in back.weights])

    monkeypatch.setitem(exports.EXPORTS, "pt2", replace(exports.EXPORTS["pt2"], read=damaged))
    with pytest.raises(SnowsError, match=told):
        export(deployable, "pt2", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_pattern_is_refused(deployable, tmp_path):
    other = replace(deployable, pattern=snows.NM(1, 4))
    with pytest.raises(SnowsError, match="pt2: 1:4 is lost along the axis that is summed over in stem, grouped"):
        export(other, "pt2", tmp_path / "model.pt2")


def test_a_layer_that_is_dense_by_its_mask_need_not_have_the_pattern(deployable):
    dense = {**deployable.masks, "fc": torch.ones_like(deployable.masks["fc"])}
    deployable.model.fc.weight.data.normal_()
    found = checked(replace(deployable, masks=dense))
    assert (found.nm_layers, found.layers) == (3, 4)


def test_a_network_that_torch_export_cannot_follow_is_refused(deployable, tmp_path):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images) if images.sum() > 0 else self.inner(-images)

    inner = {f"inner.{name}": mask for name, mask in deployable.masks.items()}
    with pytest.raises(SnowsError, match=r"^pt2: torch\.export cannot follow this network for batches of any size: "):
        export(replace(deployable, model=Branching(deployable.model), masks=inner), "pt2", tmp_path / "model.pt2")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(deployable, tmp_path):
    deployable = replace(deployable, test=lambda: pytest.fail("computed"))
    with pytest.raises(WriteError, match=r"cannot write .*nowhere/packed\.safetensors: No such file or directory"):
        export(deployable, "packed", tmp_path / "nowhere" / "packed.safetensors")


@pytest.mark.parametrize("readable", [0, 1])  # of the times that the test images are read
def test_images_that_cannot_be_read_are_no_place_that_cannot_be_written(deployable, tmp_path, readable):
    reads = iter(range(10))

    def test():
        if next(reads) >= readable:
            raise OSError(5, "Input/output error", "cat.png")
        return deployable.test()

    with pytest.raises(SnowsError, match=r"the images cannot be read: .*Input/output error: 'cat\.png'") as told:
        export(replace(deployable, test=test), "packed", tmp_path / "packed.safetensors")
    assert not isinstance(told.value, WriteError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "out", "told"), [("pt2", "x.onnx", "a file that ends in .pt2"), ("timm", "x.pt", "a folder")]
)
def test_another_ending_is_refused(deployable, tmp_path, name, out, told):
    with pytest.raises(UsageError, match=rf"{out} cannot be {name}, which is {told}"):
        export(deployable, name, tmp_path / out)


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'^openvino and nncf not installed, .*pip install "\.\[deploy\]"'):
        exports.check_exports(["packed", "int8"], ExportOptions())


def test_int8_in_half_is_refused():
    with pytest.raises(UsageError, match="`half` is for the other exports"):
        exports.check_exports(["packed", "int8"], ExportOptions(half=True))


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0])
def test_a_tolerance_that_tells_nothing_is_refused(tolerance):
    with pytest.raises(UsageError, match="`int8_tolerance` is a number of percent points, 0 or more, not"):
        exports.check_exports(["int8"], ExportOptions(int8_tolerance=tolerance))


def test_the_packages_of_the_extra_are_those_of_the_requirements_file():
    lines = (ROOT / "requirements-deploy.txt").read_text().splitlines()
    packages = [line for line in lines if line and line[0] not in "#-"]
    assert f"deploy = {packages}".replace("'", '"') in (ROOT / "pyproject.toml").read_text()
    kinds = [*exports.EXPORTS.values(), *BACKENDS.values()]
    needed = {package for kind in kinds for package in kind.needs}
    assert needed <= {package.partition(">")[0] for package in packages}


def test_too_great_a_loss_of_accuracy_is_refused_with_a_hint(deployable):
    worse = replace(checked(deployable), accuracy_before=83.4, accuracy=65.3)
    with pytest.raises(SnowsError, match=r"from 83\.40 to 65\.30 %, .* 1 points of `int8_tolerance`.*`int8_float`"):
        exports.check_tolerance(worse, ExportOptions())
    exports.check_tolerance(worse, ExportOptions(int8_tolerance=18.2))
    exports.check_tolerance(replace(worse, accuracy=None), ExportOptions())


def test_first_convolutions_are_a_stem_or_one():
    convolution, linear = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    assert int8.first_convolutions(dict(a=convolution, b=convolution, c=linear, d=linear)) == ["a", "b"]
    assert int8.first_convolutions(dict(a=convolution, b=convolution, c=convolution, d=linear)) == ["a"]
    assert int8.first_convolutions(dict(a=convolution, b=convolution)) == ["a"]
    assert int8.first_convolutions(dict(a=linear)) == []


def test_layers_in_float_go_by_their_names(deployable):
    assert int8.float_layers(deployable, ()) == ["stem"]
    assert int8.float_layers(deployable, ("none",)) == []
    assert int8.float_layers(deployable, ("fc", "g*")) == ["grouped", "fc"]
    with pytest.raises(UsageError, match="`int8_float`: no layer is called head; there are stem, grouped"):
        int8.float_layers(deployable, ("fc", "head"))
