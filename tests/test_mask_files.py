"""Masks made by plain torch code are taken in; what does not fit is listed."""

import pytest
import safetensors.torch
import torch
from conftest import TinyCNN, randomise
from torch import nn
from torch.nn.utils import prune as torch_prune

from snows import NM, Options, Unstructured, UsageError, prune
from snows.graph import Network
from snows.mask_files import read_masks


@pytest.fixture
def layers(tiny):
    return Network(tiny).layers


def half(layers, names=("stem", "grouped")):
    generator = torch.Generator().manual_seed(0)
    return {layer.name: torch.rand(layer.shape, generator=generator) < 0.5 for layer in layers if layer.name in names}


@pytest.mark.parametrize("kind", ["bool", "uint8", "float", "of weights", "data parallel"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_masks_of_any_number_type_are_read(layers, tmp_path, kind, suffix):
    masks, path = half(layers), tmp_path / f"masks{suffix}"
    state = {name: mask.to({"uint8": torch.uint8, "float": torch.float32}.get(kind)) for name, mask in masks.items()}
    if kind == "of weights":
        state = {f"{name}.weight": mask for name, mask in state.items()}
    if kind == "data parallel":
        state = {f"module.{name}": mask for name, mask in state.items()}
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    got = read_masks(path, layers)
    assert set(got) == set(masks)
    assert all(torch.equal(got[name], mask) for name, mask in masks.items())


def test_the_zeros_of_a_checkpoint_that_torch_pruned_are_a_mask_and_are_solved(tiny, images, tmp_path):
    sparse = randomise(TinyCNN())
    torch_prune.l1_unstructured(sparse.grouped, "weight", 0.5)
    torch_prune.remove(sparse.grouped, "weight")
    torch.save({"state_dict": sparse.state_dict()}, tmp_path / "sparse.pth")
    masks = read_masks(tmp_path / "sparse.pth", Network(tiny).layers)
    assert set(masks) == {"grouped"}
    pruned = prune(tiny, images, masks, Options(batch_size=2))
    assert torch.equal(pruned.model.grouped.weight != 0, sparse.grouped.weight != 0)
    assert pruned.layers[0].loss_after < pruned.layers[0].loss_before
    assert pruned.left_dense["fc"] == "no mask was given"


def wrong(layers, kind):
    masks = half(layers)
    if kind == "name":
        return {**masks, "stam": masks["stem"]}
    if kind == "shape":
        return {**masks, "stem": masks["stem"][:2]}
    if kind == "pattern":
        return {"grouped": torch.ones_like(masks["grouped"])}
    return {"fc.weight": torch.randn(3, 4)}  # a dense checkpoint


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("name", "masks of stam, which are no prunable layers"),
        ("shape", r"wrong shape: stem: \(2, 2, 3, 3\), not \(4, 2, 3, 3\)"),
        ("pattern", "does not keep to 1:2 in grouped"),
        ("dense", "neither masks nor zeros for any of the layers stem, grouped"),
    ],
)
def test_what_does_not_fit_is_listed(layers, tmp_path, kind, message):
    torch.save(wrong(layers, kind), tmp_path / "masks.pt")
    with pytest.raises(UsageError, match=message):
        read_masks(tmp_path / "masks.pt", layers, NM(1, 2))


def test_a_file_that_is_missing_damaged_or_code_is_refused(layers, tmp_path):
    with pytest.raises(UsageError, match="no such"):
        read_masks(tmp_path / "masks.pt", layers)
    (tmp_path / "masks.pt").write_text("nothing")
    with pytest.raises(UsageError, match="damaged"):
        read_masks(tmp_path / "masks.pt", layers)
    torch.save(nn.ReLU(), tmp_path / "masks.pt")
    with pytest.raises(UsageError, match="damaged or no checkpoint"):
        read_masks(tmp_path / "masks.pt", layers)


def test_a_pattern_holds_in_its_own_masks_and_only_there():
    weight = torch.randn(6, 8, 3, 3)
    assert NM(2, 4).holds(NM(2, 4).mask(weight))
    assert NM(2, 4).holds(NM(1, 4).mask(weight))
    assert not NM(1, 4).holds(NM(2, 4).mask(weight))
    assert not NM(2, 3).holds(NM(2, 4).mask(weight))
    assert not NM(2, 4).holds(~Unstructured(0.2).select({"w": weight}, weight.numel()).masks["w"].logical_not())
