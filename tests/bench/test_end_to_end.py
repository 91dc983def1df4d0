"""bench/end_to_end.py: what its rows hold, and that no row changes the network of the next."""

import sys

import common
import end_to_end
import pytest
import torch


def test_the_held_out_loss_compares_networks_as_they_classify(small):
    bench = end_to_end.Bench("resnet20_cifar10", small / "resnet20.pt", small / "images.npz", "cpu")
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    assert end_to_end.held_out_loss(bench, bench.model) == 0
    pruned = end_to_end.snows.prune(bench.model, None, end_to_end.PATTERNS["1:4"], algo="MP").model
    found = end_to_end.held_out_loss(bench, pruned)
    (images, _), *_ = bench.test
    with torch.no_grad():
        dense, sparse = bench.model.eval()(images), pruned.eval()(images)
    expected = (sparse - dense).square().sum() / dense.square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    assert all(value.equal(before[name]) for name, value in bench.model.state_dict().items())


def test_a_row_does_not_depend_on_the_rows_before_it(small, tmp_path, monkeypatch):
    def rows(out, *methods):
        flags = ["--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--images", 4]
        flags += ["--patterns", "1:4", "--out", out, "--methods", *methods]
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", "resnet20_cifar10", *map(str, flags)])
        end_to_end.main()
        kept = ("method", "accuracy", "held_out_loss", "products")
        return [{key: row[key] for key in kept} for row in common.read(out)]

    together = rows(tmp_path / "together.csv", "MP", "MP+")
    assert together == [*rows(tmp_path / "first.csv", "MP"), *rows(tmp_path / "second.csv", "MP+")]
    assert together[1]["products"] > 0
    assert (tmp_path / "figures" / "together.svg").stat().st_size > 0
