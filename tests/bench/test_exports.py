"""bench/exports.py on a small network: its rows, refusals among them, and that none is measured twice."""

import sys

import common
import deploy_tables
import exports
import pytest
import torch
from helpers import TinyCNN, randomise

from snows.zoo.images import Data


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench; returns the rows that its results file then holds."""
    images = torch.utils.data.TensorDataset(torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, -1]))
    made = (randomise(TinyCNN()).float(), Data(images, images))
    monkeypatch.setattr(exports, "network", lambda name, args: made)
    monkeypatch.setattr(exports, "RUNS", {"tiny": [("2:4", "MP", "gate"), ("unstructured 0.2", "MP", "")]})
    few = [way for way in exports.WAYS if way["export"] in ("packed", "timm")]
    monkeypatch.setattr(exports, "WAYS", few)

    def once():
        monkeypatch.setattr(sys, "argv", ["exports.py", "--out", str(tmp_path / "exports.csv"), "--networks", "tiny"])
        exports.main()
        return common.read(tmp_path / "exports.csv")

    return once


def test_every_export_has_its_row_and_none_is_measured_twice(run, capsys):
    rows = run()
    assert [(row["pattern"], row["export"]) for row in rows] == [
        ("2:4", "timm"),
        ("2:4", "packed"),
        ("unstructured 0.2", "timm"),
        ("unstructured 0.2", "packed"),
    ]
    refused, made = rows[:2]
    assert refused["refused"].startswith("timm: only networks that timm makes")
    assert refused["bytes"] is None
    assert (made["refused"], made["largest_difference"], made["nm_layers"], made["layers"]) == (None, 0, 1, 1)
    assert made["zeros_found"] == made["zeros_asked"] == 8
    assert (rows[3]["nm_layers"], rows[3]["layers"]) == (None, 4)
    capsys.readouterr()
    assert run() == rows
    assert capsys.readouterr().out == ""


def test_the_tables_of_exports_have_a_row_per_network_and_tell_refusals(run, monkeypatch):
    rows = [row | {"zstd_bytes": 500, "accuracy_before": row["bytes"] and 83.42} for row in run()]
    shared = {**rows[1], "export": "int8", "accuracy": 83.5}
    told = "int8: the accuracy falls from 83.42 to 65.30 %, by more"
    refused = {**shared, "flags": "--int8_float none", "bytes": None, "accuracy_before": None, "refused": told}
    monkeypatch.setattr(deploy_tables, "load", lambda name: [*rows, shared, refused])
    assert (
        deploy_tables.exports().splitlines()[2] == "| tiny | 2:4 | 8 of 8 | 1 of 1 | - | - | - | 0, 4/4 | - | 0, 4/4 |"
    )
    assert deploy_tables.export_sizes().count("\n") == 3
    assert deploy_tables.int8().splitlines()[2:] == ["| tiny | 2:4 | 83.42 | refused: 65.30 | 83.50 |"]
