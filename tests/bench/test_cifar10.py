"""bench/cifar10.py: the rows of its tables, and the options that their flags give."""

import sys

import cifar10
import common
import pytest

import snows


@pytest.mark.parametrize("table", cifar10.TABLES)
def test_a_rows_flags_give_the_options_that_it_runs_with(table):
    for run in cifar10.runs_of(table):
        chosen = {name: value for name, value in run.items() if name not in ("pattern", "algo", "images")}
        assert cifar10.options_of(cifar10.row_of(run)["flags"], 3) == snows.Options(**chosen, seed=3)


def test_options_of_the_command_line_make_other_rows():
    usual, changed = (
        [*map(cifar10.row_of, cifar10.runs_of("accuracy", 8, more))] for more in ({}, {"newton_steps": 2})
    )
    assert [row["flags"] for row in changed if row not in usual and row["pattern"] == "2:4"] == [
        "--joint_steps 0 --newton_steps 2",
        "--newton_steps 2",
    ]
    assert {row["images"] for row in changed} == {8}


def test_a_table_is_measured_once_each_row_with_its_flags(small, tmp_path, monkeypatch, capsys):
    def run(*more):
        flags = ["accuracy", "--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--images", 4]
        flags += ["--patterns", "2:4", "--out", tmp_path / "table.csv", "--seeds", 0, 1, *more]
        monkeypatch.setattr(sys, "argv", ["cifar10.py", *map(str, flags)])
        cifar10.main()
        return common.read(tmp_path / "table.csv")

    rows = run("--methods", "MP")
    assert [(row["algo"], row["flags"], row["seed"]) for row in rows] == [("MP", "", 0), ("MP", "", 1)]
    assert rows[0]["accuracy"] == rows[0]["masked_accuracy"]
    assert "seed" not in rows[0]["options"]
    assert "2 of 2: 2:4 MP 4 1: " in capsys.readouterr().out
    assert run("--methods", "MP") == rows
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="2"):
        run("--out", "table.json")


def test_weights_that_do_not_ship_must_be_given(tmp_path):
    with pytest.raises(snows.UsageError, match="--checkpoint is required for resnet20_cifar10"):
        cifar10.weights("resnet20_cifar10")
    assert cifar10.weights("vit_cifar10").exists()
    assert cifar10.weights("vit_cifar10", tmp_path / "mine.pt") == tmp_path / "mine.pt"
