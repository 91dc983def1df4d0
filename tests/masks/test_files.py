"""Masks made by plain torch code are taken in; what does not fit is listed."""

import pytest
import safetensors.torch
import torch
from helpers import TinyCNN, randomise
from torch import nn
from torch.nn.utils import prune as torch_prune

from snows import NM, Options, Unstructured, UsageError, prune
from snows.masks.files import check_pattern, read_masks
from snows.network.network import Network


@pytest.fixture
def network(tiny):
    return Network(tiny)


def half(network, names=("stem", "grouped")):
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: torch.rand(layer.shape, generator=generator) < 0.5
        for layer in network.layers
        if layer.name in names
    }


@pytest.mark.parametrize("kind", ["bool", "uint8", "float", "of weights", "data parallel", "lightning's"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_masks_of_any_number_type_are_read(network, tmp_path, kind, suffix):
    masks, path = half(network), tmp_path / f"masks{suffix}"
    state = {name: mask.to({"uint8": torch.uint8, "float": torch.float32}.get(kind)) for name, mask in masks.items()}
    if kind == "of weights":
        state = {f"{name}.weight": mask for name, mask in state.items()}
    if kind == "data parallel":
        state = {f"module.{name}": mask for name, mask in state.items()}
    if kind == "lightning's":  # beside what is no network's
        state = {f"model.{name}.weight": mask for name, mask in state.items()} | {"ema_decay": torch.ones(1)}
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    got = read_masks(path, network)
    assert set(got) == set(masks)
    assert all(torch.equal(got[name], mask) for name, mask in masks.items())


def test_the_zeros_of_a_checkpoint_that_torch_pruned_are_a_mask_and_are_solved(tiny, images, tmp_path):
    sparse = randomise(TinyCNN())
    torch_prune.l1_unstructured(sparse.grouped, "weight", 0.5)
    torch_prune.remove(sparse.grouped, "weight")
    torch.save({"state_dict": sparse.state_dict()}, tmp_path / "sparse.pth")
    masks = read_masks(tmp_path / "sparse.pth", Network(tiny))
    assert set(masks) == {"grouped"}
    pruned = prune(tiny, images, masks, Options(batch_size=2))
    assert torch.equal(pruned.model.grouped.weight != 0, sparse.grouped.weight != 0)
    assert pruned.layers[0].loss_after < pruned.layers[0].loss_before
    assert pruned.left_dense["fc"] == "no mask was given"


def test_the_masks_that_torch_pruning_keeps_beside_the_weights_are_taken(network, tmp_path):
    sparse = randomise(TinyCNN())
    torch_prune.l1_unstructured(sparse.grouped, "weight", 0.5)
    torch_prune.l1_unstructured(sparse.fc, "weight", 0.5)
    torch_prune.remove(sparse.fc, "weight")  # one made permanent, the other not
    expected = {"grouped": sparse.grouped.weight_mask.bool(), "fc": sparse.fc.weight != 0}
    for state in (sparse.state_dict(), {"grouped.weight_mask": sparse.grouped.weight_mask, "fc": expected["fc"]}):
        torch.save(state, tmp_path / "sparse.pth")
        masks = read_masks(tmp_path / "sparse.pth", network)
        assert masks.keys() == expected.keys()
        assert all(torch.equal(masks[name], mask) for name, mask in expected.items())


def test_the_masks_of_asp_are_taken(network, tmp_path):
    state, mask = network.model.state_dict(), half(network)["grouped"]
    state["grouped.weight"] = state["grouped.weight"] * mask
    state |= {"grouped.__weight_mma_mask": mask, "grouped.__weight_mma_pruned_p": torch.ones(2)}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "asp.pt")
    masks = read_masks(tmp_path / "asp.pt", network)
    assert masks.keys() == {"grouped"}
    assert torch.equal(masks["grouped"], mask)


def test_the_dict_of_dicts_that_nni_writes_is_taken(network, tmp_path):
    masks = half(network)
    nested = {name: {"weight": mask.float(), "bias": torch.ones(4)} for name, mask in masks.items()}
    nested["stem"]["bias"] = None
    torch.save(nested, tmp_path / "nni.pth")
    got = read_masks(tmp_path / "nni.pth", network)
    assert got.keys() == masks.keys()
    assert all(torch.equal(got[name], mask) for name, mask in masks.items())


def test_a_mask_of_ones_removes_nothing_and_keeps_to_every_pattern(tiny, images, network, tmp_path):
    torch.save({"grouped": NM(1, 2).mask(torch.randn(4, 2, 3, 3)), "fc": torch.ones(3, 4)}, tmp_path / "masks.pt")
    masks = read_masks(tmp_path / "masks.pt", network)
    check_pattern(tmp_path, masks, NM(1, 2, {"fc": "dense"}))
    pruned = prune(tiny, images, masks, Options(batch_size=5, min_samples=0))
    assert pruned.model.fc.weight.all()
    assert not torch.equal(pruned.model.fc.weight, tiny.fc.weight)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "masks"])
def test_masks_under_the_usual_keys_and_prefixes_are_found(network, tmp_path, key):
    masks = half(network)
    torch.save({key: {f"_orig_mod.{name}": mask for name, mask in masks.items()}}, tmp_path / "masks.pt")
    assert read_masks(tmp_path / "masks.pt", network).keys() == masks.keys()


def wrong(network, kind):
    masks, sparse = half(network), network.model.state_dict()
    sparse["stem.weight"] = sparse["stem.weight"] * masks["stem"]
    return {
        "name": {**masks, "stam": masks["stem"]},
        "shape": {**masks, "stem": masks["stem"][:2]},
        "dense": {"fc.weight": torch.randn(3, 4)},
        "twice": {**masks, "stem.weight": ~masks["stem"]},
        "other values": {**masks, "stem": 255 * masks["stem"].to(torch.uint8)},
        "no number": {**masks, "stem": masks["stem"] * torch.tensor(torch.nan)},
        "another network": {**sparse, "conv9.weight": torch.randn(2, 2, 1, 1)},
        "another width": {**sparse, "bn.weight": torch.randn(7)},
        "a broken weight": {**sparse, "stem.weight": sparse["stem.weight"] * torch.nan},
        "a pruned bias": {**masks, "fc.bias_mask": torch.ones(3), "fc.bias_orig": torch.randn(3)},
        "no tensors": {"epoch": 3, "net": {}},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("name", "masks of stam, which are no prunable layers"),
        ("shape", r"masks of the wrong shape: stem: \(2, 2, 3, 3\), not \(4, 2, 3, 3\)"),
        ("dense", "neither masks nor zeros for any of the layers stem, grouped"),
        ("twice", "two masks of stem"),
        ("other values", "masks with values other than 0 and 1: stem"),
        ("no number", "masks with values other than 0 and 1: stem"),
        ("another network", "weights of conv9.weight, which this network does not have"),
        ("another width", r"weights of the wrong shape: bn.weight: \(7,\), not \(4,\)"),
        ("a broken weight", "NaN in stem.weight"),
        ("a pruned bias", "masks of fc.bias"),
        ("no tensors", r"no state dict \(names and dense tensors\), but epoch, net"),
    ],
)
def test_what_does_not_fit_is_listed(network, tmp_path, kind, message):
    torch.save(wrong(network, kind), tmp_path / "masks.pt")
    with pytest.raises(UsageError, match=message):
        read_masks(tmp_path / "masks.pt", network)


def test_masks_are_held_to_the_pattern_of_each_layer(network, tmp_path):
    masks = {"grouped": NM(1, 2).mask(torch.randn(4, 2, 3, 3)), "gate": NM(3, 4).mask(torch.randn(4, 4, 1, 1))}
    check_pattern(tmp_path, masks, NM(1, 2, {"gate": "3:4"}))
    with pytest.raises(UsageError, match=r"does not keep to 1:2 in gate\."):
        check_pattern(tmp_path, masks, NM(1, 2))
    with pytest.raises(UsageError, match="layer rules in grouped"):
        check_pattern(tmp_path, masks, NM(1, 2, {"grouped": "dense", "gate": "3:4"}))


def test_a_file_that_is_missing_damaged_or_code_is_refused(network, tmp_path):
    with pytest.raises(UsageError, match="no such"):
        read_masks(tmp_path / "masks.pt", network)
    (tmp_path / "masks.pt").write_text("nothing")
    with pytest.raises(UsageError, match="damaged"):
        read_masks(tmp_path / "masks.pt", network)
    torch.save(nn.ReLU(), tmp_path / "masks.pt")
    with pytest.raises(UsageError, match="whole pickled network"):
        read_masks(tmp_path / "masks.pt", network)


def test_a_pattern_holds_in_its_own_masks_and_only_there():
    weight = torch.randn(6, 8, 3, 3)
    assert NM(2, 4).holds(NM(2, 4).mask(weight))
    assert NM(2, 4).holds(NM(1, 4).mask(weight))
    assert not NM(1, 4).holds(NM(2, 4).mask(weight))
    assert not NM(2, 3).holds(NM(2, 4).mask(weight))
    assert not NM(2, 4).holds(~Unstructured(0.2).select({"w": weight}, weight.numel()).masks["w"].logical_not())
