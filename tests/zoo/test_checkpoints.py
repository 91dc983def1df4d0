"""Checkpoints as training scripts and other tools leave them; what is no checkpoint is told in one plain line."""

import argparse
import collections
import logging
import pathlib
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import TinyCNN, randomise
from torch import nn
from torch.nn.utils import prune as torch_prune

from snows import UsageError
from snows.zoo.checkpoints import read_state
from snows.zoo.classifiers import load_checkpoint

PLAIN = re.compile(r"[^\x1b\n]+")  # one line, no escape codes


@pytest.fixture
def state(tiny):
    return tiny.state_dict()


def named(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def loads(content, state, path, key=None):
    """Whether the file gives a fresh network the weights of `state`."""
    torch.save(content, path)
    model = TinyCNN().double()
    load_checkpoint(model, path, key)
    got = model.state_dict()
    return all(torch.equal(got[name], tensor) for name, tensor in state.items())


PREFIXES = ["", "module.", "_orig_mod.", "model.", "net.", "backbone.", "module.module.", "_orig_mod.module."]
PREFIXES += ["module._orig_mod.", "model._orig_mod.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_taken_off(state, tmp_path, prefix):
    assert loads(named(state, prefix), state, tmp_path / "x.pt")


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model", "net", "state_dict_ema", "model_ema", "weights", "params", "model_state_dict", "my_own"],
)
def test_weights_under_the_keys_of_training_scripts_are_found(state, tmp_path, key):
    beside = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
    assert loads({key: state} if key == "my_own" else {key: state, **beside}, state, tmp_path / "x.pt")


def test_what_lightning_keeps_beside_the_network_is_left_out_and_said(state, tmp_path, caplog):
    caplog.set_level(logging.INFO, "snows")
    content = {
        "state_dict": {**named(state, "model."), "criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2",
    }
    assert loads(content, state, tmp_path / "x.ckpt")
    assert "begins with model. of" in caplog.text
    assert "left out criterion.weight" in caplog.text


def test_which_of_several_weights_was_taken_is_said_and_another_can_be_named(state, tmp_path, caplog):
    caplog.set_level(logging.INFO, "snows")
    ema, path = randomise(TinyCNN(), seed=9).state_dict(), tmp_path / "x.pt"
    content = {"state_dict": state, "state_dict_ema": named(ema, "module.")}
    assert loads(content, state, path)
    assert "took state_dict of" in caplog.text
    assert "also holds state_dict_ema (`checkpoint_key`)" in caplog.text
    assert loads(content, ema, path, "state_dict_ema")
    assert loads({"state_dict": {**named(state, "model."), **named(ema, "ema.")}}, ema, path, "ema")
    with pytest.raises(UsageError, match=r"has no entry 'emma' \(`checkpoint_key`\), but state_dict, state_dict_ema\."):
        loads(content, ema, path, "emma")


def test_counters_of_batches_may_be_missing_and_do_not_hide_what_else_is(state, tmp_path):
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    assert loads(old, old, tmp_path / "x.pt")
    old["head.weight"] = old.pop("fc.weight")
    with pytest.raises(UsageError, match=r"does not fit the network: missing fc.weight; unexpected head.weight\.$"):
        loads(old, old, tmp_path / "x.pt")


def test_names_are_shown_as_the_file_has_them(state, tmp_path):
    content = named(state, "model.")
    content["model.head.weight"] = content.pop("model.fc.weight")
    with pytest.raises(UsageError, match=r"missing fc\.weight; unexpected model\.head\.weight"):
        loads(content, state, tmp_path / "x.pt")


def test_harmless_objects_beside_the_weights_do_no_harm(state, tmp_path):
    beside = {"best": np.float64(93.1), "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/tmp/out"))}
    beside |= {"curve": np.arange(3.0), "epoch": np.int64(3)}
    torch.save({"model": state, **beside}, tmp_path / "x.pt")
    assert read_state(tmp_path / "x.pt").keys() == state.keys()
    torch.save({"model": state, **beside}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / "old.pt").keys() == state.keys()


def test_an_averaged_network_is_read(tiny, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(tiny)
    assert loads(averaged.state_dict(), tiny.state_dict(), tmp_path / "x.pt")


class Config:
    """A training script's own."""


class Worse:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("/tmp/never_touched"),)


@pytest.mark.parametrize("new", [True, False])
def test_a_class_that_is_in_the_way_is_named(state, tmp_path, new):
    torch.save({"model": state, "config": Config()}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(UsageError, match=r"x\.pt holds objects of [\w.]*test_checkpoints\.Config, which") as error:
        read_state(tmp_path / "x.pt")
    assert PLAIN.fullmatch(str(error.value))
    assert "weights_only" not in str(error.value)


def bad(folder, kind):
    """A file, or a path, that is no checkpoint."""
    path = folder / "x.pt"
    if kind == "network":
        torch.save(TinyCNN(), path)
    elif kind == "worse":
        torch.save({"model": {"w": torch.ones(1)}, "x": Worse()}, path)
    elif kind == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n")
    elif kind == "html":
        path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>")
    elif kind == "empty":
        path.touch()
    elif kind == "script":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    elif kind == "folder":
        (folder / "y").mkdir()
        (folder / "y" / "weights.pth").touch()
        return folder / "y"
    elif kind == "url":
        return pathlib.Path("https://example.org/weights.pth")
    return path


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("network", r"is a whole pickled network \(helpers.TinyCNN\), not its weights"),
        ("worse", r"holds objects of builtins\.getattr, pathlib\.Path, which"),
        ("lfs", "is a pointer of git-LFS"),
        ("html", "is a web page"),
        ("empty", "is empty"),
        ("script", "is a TorchScript archive"),
        ("folder", "is a folder: give a file of weights, as weights.pth"),
        ("url", "is an address: download the file"),
        ("nothing", "no such file"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_plain_line(tmp_path, kind, message):
    with pytest.raises(UsageError, match=message) as error:
        read_state(bad(tmp_path, kind))
    assert PLAIN.fullmatch(str(error.value))
    assert "weights_only" not in str(error.value)


def test_a_file_is_read_as_what_it_is_whatever_it_is_called(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "x.pt")
    torch.save(state, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        got = read_state(tmp_path / name)
        assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


def test_weights_kept_apart_from_their_masks_are_put_together(tiny, tmp_path):
    sparse = randomise(TinyCNN())
    torch_prune.l1_unstructured(sparse.grouped, "weight", 0.5)
    assert "grouped.weight_orig" in sparse.state_dict()
    expected = {**tiny.state_dict(), "grouped.weight": sparse.grouped.weight.detach()}
    assert 0 < (expected["grouped.weight"] == 0).sum() < expected["grouped.weight"].numel()
    assert loads(sparse.state_dict(), expected, tmp_path / "x.pt")


def test_the_masks_of_asp_beside_weights_are_no_weights(state, tmp_path):
    beside = {"grouped.__weight_mma_mask": state["grouped.weight"] != 0, "grouped.__weight_mma_pruned_p": torch.ones(2)}
    assert loads({**state, **beside}, state, tmp_path / "x.pt")


def test_arrays_of_numpy_and_sparse_tensors_are_taken(state, tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert loads(arrays, state, tmp_path / "x.pt")
    sparse = {name: tensor.to_sparse() if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    assert any(tensor.is_sparse for tensor in sparse.values())
    assert loads(sparse, state, tmp_path / "x.pt")


def test_a_dict_of_another_kind_is_named(state, tmp_path):
    torch.save({"state_dict": state, "history": collections.defaultdict(list, loss=[1.0, 0.5])}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=r"x.pt holds objects of .*collections\.defaultdict.*save the network's"):
        read_state(tmp_path / "x.pt")


def test_entries_of_unknown_names_are_shown_with_the_flag_that_takes_one(state, tmp_path):
    assert loads({"best_model": state, "epoch": 3}, state, tmp_path / "x.pt", key="best_model")
    with pytest.raises(UsageError, match=r"but best_model, epoch: `checkpoint_key` says which of these"):
        read_state(tmp_path / "x.pt")
