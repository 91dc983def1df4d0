"""The settings of a command: what they are made of, what args.json records, and how messages name them."""

import ast
import dataclasses
import json
import logging
import re
import sys

import pytest
from helpers import ROOT

from snows import NM, Unstructured, UsageError
from snows.cli import console, files, flags
from snows.cli.shell import Spoken, shell
from snows.result import LayerRecord

UNSTR = "CNN_pruning/unstr.py"


@pytest.fixture
def settings(monkeypatch):
    """The settings that a command line is read as."""

    def read(*argv, add=flags.add_unstructured_flags, pattern_of=flags.unstructured, **default):
        monkeypatch.setattr(sys, "argv", [str(ROOT / UNSTR), *map(str, argv)])
        parser = flags.parser("", arch="resnet20_digits")
        add(parser, **default)
        return flags.parse(parser, pattern_of)

    return read


def test_args_json_of_a_default_run_holds_what_was_really_used(script, tmp_path):
    command = ["--algo", "MP", "--skip_evaluation", "--out_dir", str(tmp_path / "run")]
    script(UNSTR, *command)
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    used = dict(arch="resnet20_digits", dset="digits", algo="MP", seed=0, target_sparsity=0.8, allocation="global")
    used |= dict(normalise=False, k_step=4, batch_size=128, ngrads=1000, skip=[], layer_sparsity={}, resumes=[])
    assert {name: saved[name] for name in used} == used
    assert metrics["dset"] == "digits"
    assert (saved["script"], saved["argv"]) == (UNSTR, command)
    assert not {"out_dir", "resume", "quiet", "pattern", "options"} & saved.keys()  # what has no bearing, or no flag


def test_settings_are_frozen(settings):
    made = settings("--seed", 3, 3, 4, "--mean", 0.5, 0.5, "--std", 1, 1, default=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.dset = "cifar10"
    with pytest.raises(TypeError):
        made.flags["dset"] = "cifar10"
    assert all(not isinstance(value, (list, dict)) for name, value in vars(made).items() if name != "changed")
    assert hash(made.runs[0])
    assert (made.mean, made.std) == ((0.5, 0.5), (1.0, 1.0))


def test_every_default_is_resolved(settings):
    made = settings("--mask_alg", "Wanda", "--seed", 3, 3, 4, "--algo", "MP", "SNOWS", default=0.5)
    assert made.pattern == Unstructured(0.5, normalise=True)
    assert made.flags["normalise"] is True
    assert made.dset == made.flags["dset"] == "digits"
    assert made.runs == [("MP", 3), ("SNOWS", 3), ("MP", 4), ("SNOWS", 4)]  # a seed's share its images
    assert [made.options_of(seed).seed for _, seed in made.runs[1:3]] == [3, 4]
    assert settings("--arch", "timm/deit_small", default=0.5).dset == "imagenet"
    made = settings("--NM_N", 1, "--preset", "paper", add=flags.add_nm_flags, pattern_of=flags.nm)
    assert (made.pattern, made.permute) == (NM(1, 4), False)
    assert made.flags["max_CG_iterations"] == made.options.max_CG_iterations == 20


def test_a_run_goes_on_with_the_settings_that_it_began_with_and_later_commands_changed(settings, tmp_path):
    saved = {"script": UNSTR, "argv": ["--seed", "5", "6"], "algo": "SNOWS", "seed": 6, "dset": "digits"}
    saved |= {"max_layer_sparsity": None, "batch_size": 64, "resumes": [{"after": 3, "batch_size": 64}]}
    files.write_json(tmp_path / "args.json", saved)
    made = settings("--resume", tmp_path, default=0.8)
    assert not made.changed
    assert (made.dset, made.options.batch_size) == ("digits", 64)
    assert made.runs == [("SNOWS", 6)]
    assert made.options.seed == 5  # random weights are those of the first command's first seed
    assert made.argv == ("--seed", "5", "6")
    assert made.resumes == ({"after": 3, "batch_size": 64},)
    with pytest.raises(UsageError, match="--dset was digits, now cifar10"):
        settings("--resume", tmp_path, "--dset", "cifar10", default=0.8)


MESSAGE = "out of memory: lower `batch_size` or `ngrads`, not `layers` nor `listener`; `max_layer_sparsity`"
AS_FLAGS = "out of memory: lower --batch_size or --ngrads, not --skip nor `listener`; --max_layer_sparsity"


@pytest.mark.usefixtures("signals")
def test_options_that_messages_name_are_flags_to_the_shell(capsys):
    def main():
        raise UsageError(MESSAGE)

    with pytest.raises(SystemExit):
        shell(main)
    assert capsys.readouterr().err == f"error: {AS_FLAGS}\n"
    for level, stream in ((logging.INFO, "out"), (logging.WARNING, "err")):
        Spoken().emit(logging.LogRecord("snows", level, "", 0, MESSAGE, (), None))
        assert getattr(capsys.readouterr(), stream) == f"{AS_FLAGS}\n"
    record = LayerRecord(name="fc", sweep=0, shape=(2, 2), sparsity=0.5, problem=MESSAGE)
    assert console.line(record).endswith(f"not solved: {AS_FLAGS}")


def test_every_flag_is_known_by_name():
    known = {"arch", "batch_size", "joint_CG_iterations", "target_sparsity", "normalise", "NM_N", "permute", "resume"}
    assert known <= flags.names()
    assert "options" not in flags.names()


def messages(path):
    """The text of a file that is neither a docstring nor a name: what it may say to somebody."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose)
    return [node.value for node in found if isinstance(node.value, str) and " " in node.value]


# What a shell does not see, besides the help of flags.
LIBRARY = [
    path for path in sorted((ROOT / "snows").rglob("*.py")) if path.parent.name != "cli" and path.stem != "options"
]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_library_names_options_and_no_flags(path):
    for text in messages(path):
        assert not re.search(r"--\w", text)
        assert set(re.findall(r"`(\w+)`", text)) <= flags.names() | {"layers"}
