"""bench/joint.py: rows that begin at the same network, and say what the joint steps came to."""

import sys

import common
import joint
import networks
import pytest


def test_all_rows_of_a_pattern_begin_at_the_same_network(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "DRAWN", 4)
    monkeypatch.setattr(networks, "SEEDS", 2)
    flags = ["--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--out", tmp_path / "joint.csv"]
    flags += ["--images", 4, "--steps", 1, 2, "--recycle", 0, 5]
    monkeypatch.setattr(sys, "argv", ["joint.py", *map(str, flags)])
    joint.main()
    rows = common.read(tmp_path / "joint.csv")
    assert [(row["joint_steps"], row["recycle"]) for row in rows] == [(1, 0), (1, 5), (2, 0), (2, 5)]
    assert len({row["loss_before"] for row in rows}) == 1
    assert all(row["loss_after"] < row["loss_before"] for row in rows)
    one, same, two, recycled = (row["loss_after"] for row in rows)
    assert one == same != two  # the first step has nothing to remember
    assert two != recycled
    assert rows[2]["products"] == pytest.approx(2 * rows[0]["products"], rel=0.5)
    capsys.readouterr()
    joint.main()
    assert common.read(tmp_path / "joint.csv") == rows
    assert capsys.readouterr().out == ""
