"""bench/imagenet_real.py on a small network and a folder of small images: its rows, and that none is measured twice."""

import sys

import common
import imagenet_real
import pytest
import torch
from PIL import Image

from snows.zoo.classifiers import from_library


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench on 24 images; returns the rows that its results file then holds."""
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        folder = tmp_path / "images" / f"class{i}"
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "image.png")
    monkeypatch.setattr(imagenet_real, "load_classifier", lambda *_: from_library("timm/test_efficientnet", False, 24))
    monkeypatch.setattr(imagenet_real, "ONE_PASS", imagenet_real.ONE_PASS.but(k_step=1, max_CG_iterations=1))
    flags = ["--dset", tmp_path / "images", "--out", tmp_path / "rows.csv", "--images", 12, "--patterns", "2:4"]

    def once(*more):
        monkeypatch.setattr(sys, "argv", ["imagenet_real.py", *map(str, [*flags, *more])])
        imagenet_real.main()
        return common.read(tmp_path / "rows.csv")

    return once


def test_every_way_has_its_row_and_none_is_measured_twice(run, monkeypatch, capsys):
    monkeypatch.setattr(
        imagenet_real, "WAYS", [way for way in imagenet_real.WAYS if not {"schedule", "k_step"} & {*way}]
    )
    rows = run()
    ways = [(row["mask"], row["algo"], row["permuted"]) for row in rows]
    all_ways = [way for way in imagenet_real.WAYS if "classifier" not in way]
    assert ways == [(way["mask"], way["algo"], way.get("permuted", False)) for way in all_ways]
    assert all(0 <= row["agreement"] <= 100 and row["logit_error"] > 0 for row in rows)
    assert all(row["sparsity"] > 0.1 and row["test_images"] == 12 for row in rows)
    capsys.readouterr()
    assert run() == rows
    assert capsys.readouterr().out == ""


def test_a_sparser_classifier_leaves_more_to_the_others(run, monkeypatch):
    ways = [way for way in imagenet_real.WAYS if way["algo"] == "SNOWS" and "schedule" not in way]
    monkeypatch.setattr(imagenet_real, "WAYS", ways)
    rows = run("--patterns", "0.7")
    assert [row["classifier"] for row in rows] == [True, False]
    assert rows[0]["sparsity"] == pytest.approx(rows[1]["sparsity"], rel=0.02)


def test_depths_are_judged_by_images_that_are_held_out(run, monkeypatch):
    monkeypatch.setattr(imagenet_real, "DEPTHS", [dict(imagenet_real.PERMUTED, k_step=k) for k in (1, 3)])
    rows = run("--depths")
    assert [(row["k_step"], row["images"], row["held_out"], row["test_images"]) for row in rows] == [
        (1, 10, 2, 2),
        (3, 10, 2, 2),
    ]
    assert rows[0]["logit_error"] != rows[1]["logit_error"]
    assert {row["accuracy"] for row in rows} == {None}


def test_the_classifier_alone_has_its_rows(run, monkeypatch):
    few = [way for way in imagenet_real.CLASSIFIER if way["images"] == 64]
    monkeypatch.setattr(imagenet_real, "CLASSIFIER", [way | {"images": 12} for way in few])
    rows = run("--classifier")
    assert [(row["algo"], row["min_samples"]) for row in rows] == [("MP", 0), ("SNOWS", 0), ("SNOWS", 10)]
    assert all(row["sparsity"] == pytest.approx(rows[0]["sparsity"], rel=0.01) for row in rows)  # biases were zero, too
    assert {row["layers"] for row in rows} == {"classifier"}
