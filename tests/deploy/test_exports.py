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
from snows.deploy.exports import export
from snows.deploy.product import How, what_is_left
from snows.errors import SnowsError, UsageError, WriteError


def same(one, other):
    return all(tensor.equal(other.state_dict()[name]) for name, tensor in one.state_dict().items())


def checked(product):
    """The check of a network beside itself."""
    read = checks.ReadBack(product.model, pt2.weights_of(product.model.state_dict()))
    return checks.check(product, checks.Logits(product.model, product), read, product.weights(product.model), [])


def test_a_folded_network_computes_the_same_without_its_batchnorm(product):
    images = product.example
    folded = product.folded
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), product.model(images))
    assert (folded.stem.weight == 0).equal(product.model.stem.weight == 0)
    assert any(isinstance(module, nn.BatchNorm2d) for module in product.model.modules())


def test_what_timms_norms_do_besides_is_left():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.Sigmoid)
    x = torch.randn(2, 4, 3, 3)
    assert what_is_left(norm)(x).equal(torch.sigmoid(x))
    assert what_is_left(nn.BatchNorm2d(4))(x).equal(x)


def test_pt2_holds_the_network_for_any_batch(product, tmp_path):
    found = export(product, "pt2", tmp_path / "model.pt2")
    assert found.largest_difference < 1e-5
    assert (found.same_class, found.images) == (5, 5)
    assert found.accuracy == found.accuracy_before
    assert found.zeros_asked == found.zeros_found == sum(int((~mask).sum()) for mask in product.masks.values())
    assert (found.layers, found.nm_layers) == (4, 4)
    assert found.bytes == (tmp_path / "model.pt2").stat().st_size
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (1, 2, 7):
        assert loaded(torch.randn(size, 4, 6, 6)).shape == (size, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


def test_packed_is_the_network_bit_for_bit(product, tmp_path):
    found = export(product, "packed", tmp_path / "packed.safetensors")
    assert found.largest_difference == 0
    model, masks = snows.load_run(tmp_path, copy.deepcopy(product.model))
    assert same(model, product.model)
    assert all(masks[name].equal(mask) for name, mask in product.masks.items())


def test_half_is_smaller_and_a_little_off(product, tmp_path):
    out = tmp_path / "packed.safetensors"
    whole, half = (export(product, "packed", out, How(half=half)) for half in (False, True))
    assert half.bytes < whole.bytes
    assert whole.largest_difference == 0 < half.largest_difference < 0.01
    assert half.zeros_found == half.zeros_asked


def test_half_computes_in_fp16_and_takes_and_gives_float32(product, tmp_path):
    found = export(product, "pt2", tmp_path / "model.pt2", How(half=True))
    assert 1e-6 < found.largest_difference < 0.01
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float16}
    assert loaded.module()(product.example).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weight: weight + 1e-3, r"pt2: zeros are lost in stem \(144 of 144\), grouped"),
        (lambda weight: -weight, "pt2: no linear map or convolution in the file has the weights of stem, grouped"),
    ],
)
def test_lost_zeros_are_refused_and_leave_no_file(product, tmp_path, monkeypatch, change, told):
    read = pt2.read

    def damaged(file, product):
        back = read(file, product)
        return checks.ReadBack(back.run, [(name, change(weight)) for name, weight in back.weights])

    monkeypatch.setitem(exports.EXPORTS, "pt2", replace(exports.EXPORTS["pt2"], read=damaged))
    with pytest.raises(SnowsError, match=told):
        export(product, "pt2", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_pattern_is_refused(product, tmp_path):
    other = replace(product, pattern=snows.NM(1, 4))
    with pytest.raises(SnowsError, match="pt2: 1:4 is lost along the axis that is summed over in stem, grouped"):
        export(other, "pt2", tmp_path / "model.pt2")


def test_a_layer_that_is_dense_by_its_mask_need_not_have_the_pattern(product):
    dense = {**product.masks, "fc": torch.ones_like(product.masks["fc"])}
    product.model.fc.weight.data.normal_()
    found = checked(replace(product, masks=dense))
    assert (found.nm_layers, found.layers) == (3, 4)


def test_a_network_that_torch_export_cannot_follow_is_refused(product, tmp_path):
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images) if images.sum() > 0 else self.inner(-images)

    inner = {f"inner.{name}": mask for name, mask in product.masks.items()}
    with pytest.raises(SnowsError, match=r"^pt2: torch\.export cannot follow this network for batches of any size: "):
        export(replace(product, model=Branching(product.model), masks=inner), "pt2", tmp_path / "model.pt2")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_computed(product, tmp_path):
    product = replace(product, test=lambda: pytest.fail("computed"))
    with pytest.raises(WriteError, match=r"cannot write .*nowhere/packed\.safetensors: No such file or directory"):
        export(product, "packed", tmp_path / "nowhere" / "packed.safetensors")


@pytest.mark.parametrize("readable", [0, 1])  # of the times that the test images are read
def test_images_that_cannot_be_read_are_no_place_that_cannot_be_written(product, tmp_path, readable):
    reads = iter(range(10))

    def test():
        if next(reads) >= readable:
            raise OSError(5, "Input/output error", "cat.png")
        return product.test()

    with pytest.raises(SnowsError, match=r"the images cannot be read: .*Input/output error: 'cat\.png'") as told:
        export(replace(product, test=test), "packed", tmp_path / "packed.safetensors")
    assert not isinstance(told.value, WriteError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "out", "told"), [("pt2", "x.onnx", "a file that ends in .pt2"), ("timm", "x.pt", "a folder")]
)
def test_another_ending_is_refused(product, tmp_path, name, out, told):
    with pytest.raises(UsageError, match=rf"{out} cannot be {name}, which is {told}"):
        export(product, name, tmp_path / out)


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'^openvino and nncf not installed, .*pip install "\.\[deploy\]"'):
        exports.check_exports(["packed", "int8"], How())


def test_int8_in_half_is_refused():
    with pytest.raises(UsageError, match="`half` is for the other exports"):
        exports.check_exports(["packed", "int8"], How(half=True))


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0])
def test_a_tolerance_that_tells_nothing_is_refused(tolerance):
    with pytest.raises(UsageError, match="`int8_tolerance` is a number of percent points, 0 or more, not"):
        exports.check_exports(["int8"], How(int8_tolerance=tolerance))


def test_the_packages_of_the_extra_are_those_of_the_requirements_file():
    lines = (ROOT / "requirements-deploy.txt").read_text().splitlines()
    packages = [line for line in lines if line and line[0] not in "#-"]
    assert f"deploy = {packages}".replace("'", '"') in (ROOT / "pyproject.toml").read_text()
    kinds = [*exports.EXPORTS.values(), *BACKENDS.values()]
    needed = {package for kind in kinds for package in kind.needs}
    assert needed <= {package.partition(">")[0] for package in packages}


def test_too_great_a_loss_of_accuracy_is_refused_with_a_hint(product):
    worse = replace(checked(product), accuracy_before=83.4, accuracy=65.3)
    with pytest.raises(SnowsError, match=r"from 83\.40 to 65\.30 %, .* 1 points of `int8_tolerance`.*`int8_float`"):
        exports.check_tolerance(worse, How())
    exports.check_tolerance(worse, How(int8_tolerance=18.2))
    exports.check_tolerance(replace(worse, accuracy=None), How())


def test_first_convolutions_are_a_stem_or_one():
    convolution, linear = nn.Conv2d(1, 1, 1), nn.Linear(1, 1)
    assert int8.first_convolutions(dict(a=convolution, b=convolution, c=linear, d=linear)) == ["a", "b"]
    assert int8.first_convolutions(dict(a=convolution, b=convolution, c=convolution, d=linear)) == ["a"]
    assert int8.first_convolutions(dict(a=convolution, b=convolution)) == ["a"]
    assert int8.first_convolutions(dict(a=linear)) == []


def test_layers_in_float_go_by_their_names(product):
    assert int8.float_layers(product, ()) == ["stem"]
    assert int8.float_layers(product, ("none",)) == []
    assert int8.float_layers(product, ("fc", "g*")) == ["grouped", "fc"]
    with pytest.raises(UsageError, match="`int8_float`: no layer is called head; there are stem, grouped"):
        int8.float_layers(product, ("fc", "head"))
