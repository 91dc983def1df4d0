"""A command's runs from inside: what they measure, in which order they go, and what they say of layers left dense."""

import json
import shutil
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import snows
from snows.cli import experiment, flags
from snows.cli.task import Task
from snows.errors import SnowsError, UsageError
from snows.zoo import evaluate
from snows.zoo.classifiers import Classifier
from snows.zoo.images import normalised
from snows.zoo.registry import load_classifier, load_data, unshipped


class Frozen(nn.Module):
    """Reads its first layer's weight where the trace does not see it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        hidden = dict(self.first.named_parameters())["weight"].abs().mean()
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)) * hidden * 10))))


KNOWN = {"frozen_digits": lambda pretrained: Classifier(Frozen(), normalised((0.5,), (0.5,)))}
FEW = ["--ngrads", "16", "--k_step", "1", "--max_CG_iterations", "1", "--joint_CG_iterations", "1", "--quiet"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command on that network; returns the metrics of its runs."""

    def once(*given, **how):
        parser = flags.parser("", arch="frozen_digits")
        flags.add_nm_flags(parser)
        monkeypatch.setattr(sys, "argv", ["prune_NM.py", *FEW, *map(str, given), "--out_dir", str(tmp_path / "run")])
        return experiment.run(flags.parse(parser, flags.nm), KNOWN, **how)

    return once


def strict(text):
    """JSON as the standard has it, without NaN and infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("mask_alg", ["MP", "Wanda"])
def test_what_a_run_leaves_dense_is_in_its_metrics_and_not_masked_before(run, tmp_path, mask_alg, capsys):
    (metrics,) = run("--mask_alg", mask_alg, "--schedule", 0, "--joint_steps", 0)
    saved = strict((tmp_path / "run" / "metrics.json").read_text())
    assert list(saved["left_dense"]) == list(metrics["left_dense"]) == ["first"]
    assert "the trace has frozen" in saved["left_dense"]["first"]
    assert "pruning 2 layers: second, third" in capsys.readouterr().out
    assert saved["masked_accuracy"] > 5
    masked, masks = Frozen().eval(), safetensors.torch.load_file(tmp_path / "run" / "masks.safetensors")
    for name in ("second", "third"):  # and not the first
        masked.get_submodule(name).weight.data *= masks[name]
    data = load_data("frozen_digits", KNOWN["frozen_digits"](False), "digits", tmp_path)
    assert evaluate.accuracy(masked, data.test_batches(256)) == pytest.approx(saved["masked_accuracy"])


@pytest.mark.parametrize("flags", [("--schedule", 0, "--joint_steps", 1), ("--algo", "MP")])
def test_all_that_a_run_writes_is_json(run, tmp_path, flags):
    run(*flags)
    for file in (tmp_path / "run").glob("*.json"):
        strict(file.read_text())
    (first, *_) = strict((tmp_path / "run" / "layers.json").read_text())
    assert (first["loss_before"] is None) == ("MP" in flags)  # where nothing was solved, it is not a number


def test_joint_steps_are_measured_once_for_all_layers(run, tmp_path, monkeypatch):
    counted, score = [], evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *args, **how: counted.append(0) or score(*args, **how))
    run("--schedule", 1, "--joint_steps", 1, "--joint_stages", "True", "--evaluate_layers")
    layers = strict((tmp_path / "run" / "layers.json").read_text())
    assert [(layer["sweep"], layer["joint"]) for layer in layers] == [
        (sweep, sweep % 2 == 1) for sweep in range(4) for _ in range(2)
    ]
    joint = [layer["accuracy"] for layer in layers if layer["joint"]]
    assert joint[0] == joint[1] is not None
    assert joint[2] == joint[3] is not None
    assert len(counted) == 2 + 3 + 3 + 1  # dense and masked, two layers and the joint steps twice, and the end


def test_the_runs_of_a_seed_share_its_images_and_masks(run, monkeypatch):
    drawn, selection = [], Task.selection
    monkeypatch.setattr(Task, "selection", lambda task, seed: drawn.append(seed) or selection(task, seed))
    found = run("--algo", "MP", "MP+", "--seed", 0, 1, "--mask_alg", "Wanda")
    assert [(each["algo"], each["seed"]) for each in found] == [("MP", 0), ("MP+", 0), ("MP", 1), ("MP+", 1)]
    assert drawn == sorted(drawn)


def test_every_name_or_pattern_of_a_flag_must_name_a_layer(run):
    with pytest.raises(UsageError, match="--parts: no prunable layer is named MLP; those are first, second"):
        run(named={"--parts": ["second", "MLP"]})


def test_a_command_of_several_runs_goes_on_with_those_that_have_not_begun(run, tmp_path, capsys, monkeypatch):
    flags = ["--algo", "MP", "MP+", "--seed", 0, 1]
    first = run(*flags)
    assert run(*flags) == first
    assert capsys.readouterr().out.count("is finished already") == 4
    shutil.rmtree(tmp_path / "run" / "MP+-seed0")
    shutil.rmtree(tmp_path / "run" / "MP-seed1")
    times = {folder: (folder / "metrics.json").stat().st_mtime_ns for folder in (tmp_path / "run").iterdir()}
    again = sorted(run(*flags), key=lambda metrics: (metrics["seed"], metrics["algo"]))
    names = ("algo", "seed", "accuracy", "sparsity")
    assert [[each[n] for n in names] for each in again] == [[each[n] for n in names] for each in first]
    assert all((folder / "metrics.json").stat().st_mtime_ns == time for folder, time in times.items())

    with pytest.raises(UsageError, match=r"MP-seed0 holds a run of another command: choose another --out_dir"):
        run(*flags, "--NM_N", 1)
    metrics = tmp_path / "run" / "MP+-seed1" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"finished": true', '"finished": false'))
    with pytest.raises(UsageError, match=r"was stopped: go on with it first: .*--resume .*seed1"):
        run(*flags)


def test_what_does_not_fit_is_said_before_any_image_is_tested(run, monkeypatch):
    monkeypatch.setattr(evaluate, "score", None)
    with pytest.raises(SnowsError, match="nothing to prune: "):
        run("--NM_N", 1, "--NM_M", 7)


def test_a_network_that_does_not_fit_a_run_is_told_in_a_line(run, tmp_path):
    run("--algo", "MP")
    with pytest.raises(SnowsError, match=r"does not fit the network: missing 0\.weight, 0\.bias; unexpected first"):
        snows.load_run(tmp_path / "run", nn.Sequential(nn.Linear(64, 10)))


def test_a_network_of_ones_own_has_no_weights_but_those_of_a_checkpoint(tmp_path):
    known = {"own_digits": unshipped(Frozen, normalised((0.5,), (0.5,)))}
    with pytest.raises(UsageError, match="no weights are known of this network: give a file of them as `checkpoint`"):
        load_classifier("own_digits", known)
    assert isinstance(load_classifier("own_digits", known, random_weights=True).model, Frozen)
    torch.save(Frozen().state_dict(), tmp_path / "own.pt")
    assert isinstance(load_classifier("own_digits", known, tmp_path / "own.pt").model, Frozen)
