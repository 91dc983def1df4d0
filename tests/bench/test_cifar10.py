"""bench/cifar10.py: the rows of its tables, and the options that their flags give."""

import sys

import cells
import cifar10
import common
import pytest
import torch

import snows
from snows.cli.option_flags import options_of


@pytest.mark.parametrize("table", cifar10.TABLES)
def test_a_rows_flags_give_the_options_that_it_runs_with(table):
    for run in cifar10.runs_of(table):
        chosen = {name: value for name, value in run.items() if name not in ("pattern", "algo", "images", "protocol")}
        args = cifar10.read(cifar10.row_of(run)["flags"])
        assert options_of(args, 3) == snows.Options(**chosen, seed=3)
        assert (args.protocol == "published") == ("protocol" in run)
        assert (args.permute, args.mask_alg) == (False, "MP")


def test_options_of_the_command_line_make_other_rows():
    usual, changed = (
        [*map(cifar10.row_of, cifar10.runs_of("accuracy", 8, more))]
        for more in ({}, {"newton_steps": 2, "joint_steps": 8, "joint_stages": True})
    )
    assert [row["flags"] for row in changed if row not in usual and row["pattern"] == "2:4"] == [
        "--newton_steps 2 --joint_steps 0 --joint_stages True",  # layer by layer all the same
        "--newton_steps 2 --joint_steps 8 --joint_stages True",
        "--newton_steps 2 --joint_steps 8 --joint_stages True --protocol published",
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


def test_the_published_protocol_leaves_shortcuts_dense_and_calibrates_on_views(small, monkeypatch):
    bench, jobs = cifar10.Bench("resnet20_cifar10", small / "resnet20.pt", small / "images.npz", "cpu"), []

    def pretend(model, calibration, pattern, chosen, *, layers, **how):
        jobs.append((calibration, [name for name in names if not layers(name)], how["algo"]))
        return snows.result.Pruned(model, {})

    names = [layer.name for layer in snows.Network(bench.model).layers]
    monkeypatch.setattr(snows, "prune", pretend)
    monkeypatch.setattr(cifar10.Bench, "masked_accuracy", lambda bench, pattern: 10.0)
    runs = [run for run in cifar10.runs_of("accuracy", 4) if run["pattern"] == "2:4"]
    rows = {cifar10.method_of(run): {**cifar10.row_of(run), "seed": 1} for run in runs}
    figures = [cifar10.measure(bench, rows[method]) for method in ("SNOWS", "published")]
    assert [figure["masked_accuracy"] for figure in figures] == [10.0, None]  # of another mask
    (images, dense, _), (seen, shortcuts, algo) = jobs
    assert (dense, algo) == ([], "SNOWS")
    assert shortcuts == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
    assert seen.equal(cifar10.views(images, cifar10.torch.Generator().manual_seed(1)))
    assert not seen.equal(images)


def test_permuted_rows_prune_the_same_function_in_another_order(small, monkeypatch):
    bench, models = cifar10.Bench("resnet20_cifar10", small / "resnet20.pt", small / "images.npz", "cpu"), []

    def pretend(model, *_, mask_alg, **__):
        models.append(model)
        assert mask_alg == "ALPS"
        return snows.result.Pruned(model, {})

    monkeypatch.setattr(snows, "prune", pretend)
    (run,) = (
        run
        for run in cifar10.runs_of("accuracy", 4, {"permute": True, "mask_alg": "ALPS"})
        if run["pattern"] == "2:4" and cifar10.method_of(run) == "SNOWS"
    )
    row = {**cifar10.row_of(run), "seed": 0}
    assert row["flags"] == "--permute --mask_alg ALPS"
    assert cells.flags(row) == ["--images 4", "--permute", "--mask_alg ALPS"]
    assert cifar10.measure(bench, row)["masked_accuracy"] is None
    images, _ = bench.data.calibration(4, 0)
    torch.testing.assert_close(models[0](images), bench.model(images))
    assert not models[0].layer1[0].conv1.weight.equal(bench.model.layer1[0].conv1.weight)


def test_weights_that_do_not_ship_must_be_given(tmp_path):
    with pytest.raises(snows.UsageError, match="--checkpoint is required for resnet20_cifar10"):
        cifar10.weights("resnet20_cifar10")
    assert cifar10.weights("vit_cifar10").exists()
    assert cifar10.weights("vit_cifar10", tmp_path / "mine.pt") == tmp_path / "mine.pt"
