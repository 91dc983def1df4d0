"""bench/ideas.py: each idea changes what it says, and nothing else."""

import sys
from types import SimpleNamespace

import common
import ideas
import pytest
import torch

import snows


@pytest.fixture
def bench(small):
    return ideas.Bench(ideas.NETWORK, small / "resnet20.pt", small / "images.npz", "cpu")


def test_a_row_says_how_far_the_logits_are_on_unseen_images(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ideas, "held_out", lambda data: data.test_batches(4))
    flags = ["--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", "--out", tmp_path / "ideas.csv"]
    flags += ["--images", 4, "--patterns", "1:4", "--ideas", "no schedule"]
    monkeypatch.setattr(sys, "argv", ["ideas.py", *map(str, flags)])
    ideas.main()
    (row,) = common.read(tmp_path / "ideas.csv")
    assert row["held_out_error"] > 0
    assert row["products"] > 0
    capsys.readouterr()
    ideas.main()
    assert capsys.readouterr().out == ""


def test_the_logits_weigh_more_in_joint_objectives_alone(monkeypatch):
    monkeypatch.setattr(ideas, "solve", lambda objective, *_: objective)
    for layers, expected in ((1, 2.0), (2, 40.0)):
        window = SimpleNamespace(layers=[None] * layers)
        objective = SimpleNamespace(window=window, coefficients=[1.0, 2.0])
        assert ideas.weighing_logits(20.0)(objective, *[None] * 4).coefficients == [1.0, expected]


def test_masks_by_another_choice_keep_as_many_weights_of_each_layer(bench):
    pattern = ideas.PATTERNS["unstructured 0.8"]
    by_magnitude = snows.choose_masks(bench.model, None, pattern).masks
    images, _ = bench.data.calibration(8, 0)
    counted = ideas.with_counts(bench.model, pattern, bench.layers)
    by_obs = snows.choose_masks(bench.model, images, counted, mask_alg="OBS").masks
    for name, mask in by_magnitude.items():
        assert by_obs[name].sum().item() == pytest.approx(mask.sum().item(), abs=1)
    assert any(not by_obs[name].equal(mask) for name, mask in by_magnitude.items())


def test_every_image_comes_once_as_it_is_and_once_mirrored():
    images = torch.arange(12.0).view(2, 1, 2, 3)
    both = ideas.with_mirror_images(images, 0)
    found = sorted(each.flatten().tolist() for each in both)
    assert found == sorted(each.flatten().tolist() for part in (images, images.flip(-1)) for each in part)


def test_channels_in_another_order_are_the_same_network(bench, monkeypatch):
    models = []
    monkeypatch.setattr(snows, "prune", lambda model, *_, **__: models.append(model))
    for idea in ("the defaults", "channels in another order"):
        ideas.prune(bench, {"idea": idea, "pattern": "1:4", "images": 4, "seed": 0})
    images, _ = bench.data.calibration(4, 0)
    assert models[0] is bench.model
    torch.testing.assert_close(models[1](images), bench.model(images))
    assert not models[1].layer1[0].conv1.weight.equal(bench.model.layer1[0].conv1.weight)
