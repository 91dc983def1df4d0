"""Packed checkpoints: bit for bit what was packed, smaller where there are zeros, and read wherever weights are."""

import pytest
import safetensors.torch
import torch
from helpers import TinyCNN, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.errors import SnowsError, UsageError
from snows.masks.files import read_masks
from snows.zoo import packed
from snows.zoo.checkpoints import read_state
from snows.zoo.classifiers import load_checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]
DTYPES += [torch.int64, torch.int8, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    """A tensor of any shape and type, with any share of zeros, and numbers that are easily mistaken for others."""
    shape, dtype = draw(st.lists(st.integers(0, 5), max_size=4)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    odd = torch.tensor([-0.0, float("nan"), float("inf"), 1e-310])[torch.randint(4, shape, generator=generator)]
    if dtype.is_floating_point:
        tensor = torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.3])), odd, tensor)
    kept = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]))
    return torch.where(kept, tensor, 0.0).to(dtype)


def same_bits(one, other):
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and packed.entries(one.contiguous()).equal(packed.entries(other.contiguous()))


def written(path, content):
    path.write_bytes(content)
    return path


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.sampled_from(["a", "b.weight", "b.bias", "c_weight"]), tensors()))
def test_whatever_is_packed_comes_back_bit_for_bit(state, tmp_path_factory):
    file = written(tmp_path_factory.getbasetemp() / "any.safetensors", packed.pack(state))
    found, masks = packed.unpack(file)
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    assert masks == {}


@settings(max_examples=30, deadline=None)
@given(weight=tensors(), share=st.sampled_from([0.0, 0.3, 1.0]), name=st.sampled_from(["a", "a.weight", "a_weight"]))
def test_the_masks_come_back_too_with_survivors_that_are_zero(weight, share, name, tmp_path_factory):
    mask = torch.rand(weight.shape) < share
    weight = torch.where(mask, weight, torch.zeros_like(weight)) if weight.dtype != torch.float8_e4m3fn else weight
    wanted = mask | packed.has_bits(weight.contiguous()).reshape(mask.shape)
    file = written(tmp_path_factory.getbasetemp() / "masks.safetensors", packed.pack({name: weight}, {"a": mask}))
    found, masks = packed.unpack(file)
    assert same_bits(found[name], weight)
    assert masks.keys() == {"a"}
    assert masks["a"].equal(wanted)


def test_a_sparse_network_takes_a_bit_for_each_weight_and_the_kept_values():
    weight = torch.where(torch.rand(100, 100) < 0.2, torch.randn(100, 100), 0.0)
    size = len(packed.pack({"a.weight": weight}))
    values = 4 * int(weight.count_nonzero()) + 100 * 100 // 8
    assert values < size < values + 400  # the header's


def test_what_does_not_get_smaller_is_kept_as_it_is(tmp_path):
    state = {"a.weight": torch.randn(10, 10), "tied.weight": torch.randn(10, 10)}
    state["tied.weight"] = state["a.weight"]
    file = written(tmp_path / "x.safetensors", packed.pack(state))
    assert safetensors.torch.load_file(file).keys() == state.keys()


@pytest.fixture
def pruned():
    return snows.prune(randomise(TinyCNN()).float(), None, snows.Unstructured(0.5), algo="MP")


@pytest.fixture
def file(pruned, tmp_path):
    return written(tmp_path / "packed.safetensors", packed.pack(pruned.model.state_dict(), pruned.masks))


def test_it_is_a_checkpoint(pruned, file):
    model = TinyCNN()
    load_checkpoint(model, file)
    assert all(same_bits(tensor, pruned.model.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_it_is_a_file_of_masks(pruned, file):
    masks = read_masks(file, snows.Network(randomise(TinyCNN()).float()))
    assert masks.keys() == pruned.masks.keys()
    assert all(masks[name].equal(mask) for name, mask in pruned.masks.items())


@pytest.mark.parametrize("which", ["the folder", "the file"])
def test_it_is_a_run_that_loads_back(pruned, file, which):
    model, masks = snows.load_run(file.parent if which == "the folder" else file, TinyCNN())
    assert all(same_bits(tensor, pruned.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(masks[name].equal(mask) for name, mask in pruned.masks.items())


def tampered(file, change):
    """The file with other tensors or another header."""
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    change(tensors, metadata)
    file.write_bytes(safetensors.torch.save(tensors, metadata))


def shorten(tensors, metadata):
    tensors["gate.weight.values"] = tensors["gate.weight.values"][1:].clone()


def drop(tensors, metadata):
    del tensors["gate.weight.bitmask"]


def of_another_version(tensors, metadata):
    metadata[packed.FORMAT] = "2"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (shorten, r"weight has \d+ values for \d+ bits"),
        (drop, "gate.weight.bitmask"),
        (of_another_version, "version 2"),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(file, change, told):
    tampered(file, change)
    with pytest.raises(UsageError, match=told):
        read_state(file)
    with pytest.raises(SnowsError, match=f"cannot load .*{told}"):
        snows.load_run(file, TinyCNN())


@pytest.mark.parametrize("model", [TinyCNN, "TinyCNN"])
def test_a_run_is_loaded_into_a_network_alone(tmp_path, model):
    with pytest.raises(snows.UsageError, match=r"a network is needed to load the weights into, not .*TinyCNN"):
        snows.load_run(tmp_path, model)
