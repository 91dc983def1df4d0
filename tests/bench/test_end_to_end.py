"""bench/end_to_end.py: what its rows hold, and that no row changes the network of the next."""

import sys
from dataclasses import replace

import baselines
import cells
import common
import end_to_end
import networks
import numpy as np
import pytest
import torch

import snows

DISTILLATION = "distillation: Adam, MSE, no views, BatchNorm in training"


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Runs the bench on images of eight, four of which are drawn; returns the rows of a results file."""

    def once(out, *more):
        flags = ["--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--images", 4]
        flags += ["--patterns", "1:4", "--out", tmp_path / out, *more]
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", "resnet20_cifar10", *map(str, flags)])
        end_to_end.main()
        return common.read(tmp_path / out)

    monkeypatch.setattr(networks, "DRAWN", 4)
    monkeypatch.setattr(networks, "SEEDS", 2)
    return once


def test_the_held_out_loss_compares_networks_as_they_classify(small):
    bench = end_to_end.Bench("resnet20_cifar10", small / "resnet20.pt", small / "images.npz", "cpu")
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    assert end_to_end.held_out_loss(bench, bench.model, bench.test) == 0
    pruned = end_to_end.snows.prune(bench.model, None, end_to_end.PATTERNS["1:4"], algo="MP").model
    found = end_to_end.held_out_loss(bench, pruned, bench.test)
    (images, _), *_ = bench.test
    with torch.no_grad():
        dense, sparse = bench.model.eval()(images), pruned.eval()(images)
    expected = (sparse - dense).square().sum() / dense.square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert all(value.equal(before[name]) for name, value in bench.model.state_dict().items())


def test_a_row_does_not_depend_on_the_rows_before_it(run, tmp_path):
    def rows(out, *methods):
        kept = ("method", "accuracy", "held_out_loss", "held_out_error", "products")
        return [{key: row[key] for key in kept} for row in run(out, "--methods", *methods)]

    together = rows("together.csv", "MP", "MP+", end_to_end.REESTIMATED)
    apart = [rows(f"{i}.csv", method)[0] for i, method in enumerate(("MP", "MP+", end_to_end.REESTIMATED))]
    assert together == apart
    assert together[1]["products"] > 0
    assert len({row["held_out_error"] for row in together}) == 3
    assert (tmp_path / "figures" / "together.svg").stat().st_size > 0


def test_a_trainings_rate_is_chosen_with_the_first_seed_on_images_that_are_held_out(run, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "within", lambda seconds, *job: replace(job[4], steps=2))
    monkeypatch.setattr(end_to_end, "RATES", {"Adam": (1e-9, 1e-2, 1e9)})
    flags = ["--methods", DISTILLATION, "--budgets", 60, "--seeds", 1, 0]
    rows = run("rates.csv", *flags)
    first, (other,) = rows[:3], rows[3:]
    assert [(row["seed"], row["lr"], row["budget"], row["steps"]) for row in first] == [
        (0, 1e-9, 60, 2), (0, 1e-2, 60, 2), (0, 1e9, 60, 2),
    ]  # fmt: skip
    finite = [row for row in first if row["held_out_error"] is not None]
    assert (other["seed"], other["lr"]) == (1, min(finite, key=lambda row: row["held_out_error"])["lr"])
    assert cells.of_chosen_rates(rows) == [row for row in rows if row["lr"] == other["lr"]]
    capsys.readouterr()
    assert run("rates.csv", *flags) == rows
    assert capsys.readouterr().out == ""


def test_other_seeds_wait_until_every_rate_of_the_first_is_measured(tmp_path):
    results = common.Results(tmp_path / "rows.csv")
    run = {"network": "a", "images": 4, "method": DISTILLATION, "pattern": "2:4", "seed": 0, "budget": 9}
    first = [{**run, "lr": lr} for lr in (0.1, 0.2)]
    results.add({**first[0], "held_out_error": 0.5})
    assert end_to_end.other_seeds(first, [0, 1], results) == []
    results.add({**first[1], "held_out_error": 0.4})
    assert end_to_end.other_seeds(first, [0, 1], results) == [{**first[1], "seed": 1}]


def test_the_groups_name_every_method_once():
    names = [name for group in end_to_end.GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(baselines.TRAININGS) < set(end_to_end.BASELINES)
    assert {"best", *snows.options.PRESETS} - {"paper"} <= set(end_to_end.METHODS)


def test_no_calibration_draws_an_image_that_is_held_out(monkeypatch):
    pixels = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1).repeat(3, axis=3)
    whole = networks.data.Data(networks.data.Arrays(pixels, None, networks.data.normalised(*[networks.HALF] * 2)), None)
    monkeypatch.setattr(networks, "DRAWN", 10)
    monkeypatch.setattr(networks, "SEEDS", 3)
    drawn = torch.cat([whole.calibration(10, seed)[0] for seed in range(3)]).flatten(1).unique(dim=0)
    held = torch.cat([batch for batch, _ in networks.held_out(whole, 20)]).flatten(1)
    assert len(held) == 20 == len(held.unique(dim=0))
    assert not any(image.equal(other) for image in held for other in drawn)
    assert torch.cat([batch for batch, _ in networks.held_out(whole, 20)]).flatten(1).equal(held)
    monkeypatch.setattr(networks, "DRAWN", 60)
    with pytest.raises(snows.UsageError, match="too few to hold some out"):
        networks.held_out(whole)


@pytest.mark.parametrize("build", [end_to_end.lbfgs, lambda parameters: torch.optim.Adam(parameters, lr=3e-3)])
def test_first_order_solvers_leave_a_layer_of_few_samples_but_for_its_bias(build, tiny, images, caplog):
    solver = end_to_end.snows_with(end_to_end.first_order(build))
    options = snows.Options(schedule=0, joint_steps=0, min_samples=1e9)
    pruned = snows.prune(tiny, images, snows.NM(1, 2), options, algo=solver)
    assert not any("support" in record.message for record in caplog.records)
    for layer in pruned.layers:
        assert layer.loss_after <= layer.loss_before
    for name, mask in pruned.masks.items():
        weight = pruned.model.get_submodule(name).weight
        assert weight.equal(tiny.get_submodule(name).weight * mask)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured 0.8"])
def test_masks_by_alps_are_asked_for_and_channels_permuted_under_n_m(small, monkeypatch, pattern):
    bench, asked = end_to_end.Bench("resnet20_cifar10", small / "resnet20.pt", small / "images.npz", "cpu"), []
    monkeypatch.setattr(snows, "prune", lambda *job, **how: asked.append((job, how)))
    images, _ = bench.data.calibration(4, 0)
    for method in ("ALPS", "best, masks by ALPS", "best, permuted, masks by ALPS")[: 3 if ":" in pattern else 2]:
        end_to_end.prune(bench, {"method": method, "pattern": pattern, "seed": 0}, images)
        (model, *_), how = asked.pop()
        assert (how["mask_alg"], how.get("algo", "SNOWS")) == ("ALPS", "MP+" if method == "ALPS" else "SNOWS")
        assert (model is bench.model) == ("permuted" not in method)
        torch.testing.assert_close(model(images), bench.model(images))
