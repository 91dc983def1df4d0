"""bench/baselines.py on a tiny network: what a training does, by which statistics, and that the seed decides it all."""

from dataclasses import replace

import baselines
import networks
import pytest
import torch
import torch.nn.functional as F
from baselines import TRAININGS, Outputs, Training, train
from helpers import TinyCNN, randomise

import snows

FEW = dict(batch_size=8, steps=40)


@pytest.fixture(scope="module")
def job():
    """(dense network, masked network, masks, 24 images)"""
    images = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = baselines.reestimated(randomise(TinyCNN()), images)  # a trained network's statistics are its features'
    pruned = snows.prune(dense, None, snows.Unstructured(0.7), algo="MP")
    return dense, pruned.model, pruned.masks, images


def copies(*models):
    return [{name: value.clone() for name, value in model.state_dict().items()} for model in models]


def same(model, state):
    return all(value.equal(state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def loss(job, model, training):
    """A training's loss on the images, as it sees them."""
    dense, _, masks, images = job
    if training.views:  # of images that are mostly border, beside those that they are cut out of
        images = networks.views(images.repeat(8, 1, 1, 1), torch.Generator().manual_seed(9))
    names = list(masks) if training.loss == "layers" else []
    return baselines.LOSSES[training.loss](Outputs(model, names)(images), Outputs(dense.eval(), names)(images)).item()


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_lowers_its_loss_on_its_support_and_leaves_the_networks_it_is_given(name, job):
    dense, start, masks, _ = job
    _, training = TRAININGS[name]
    training = replace(training, **FEW, lr=1e-2)
    before = copies(dense, start)
    trained = train(*job, training)
    assert all(same(model, state) for model, state in zip((dense, start), before))
    assert not any(module.training for module in trained.modules())
    for layer, mask in masks.items():
        weight, first = trained.get_submodule(layer).weight, start.get_submodule(layer).weight
        assert not weight[~mask].any()
        assert not weight[mask].equal(first[mask])
    changed = any(not trained.get_buffer(n).equal(b) for n, b in start.named_buffers() if n.endswith("running_mean"))
    assert changed == (training.batch_norm == "training")
    assert loss(job, trained, training) < loss(job, start, training)


def test_the_names_say_what_the_trainings_are():
    assert len(TRAININGS) == 2 * 2 * 2 * 2 + 2
    for name, (start, training) in TRAININGS.items():
        assert (training.loss == "layers") == name.startswith("global AdaPrune")
        assert start == ("MP+" if name == "global AdaPrune" else "MP")
    assert "distillation: SGD, KL, no views, BatchNorm in evaluation" in TRAININGS


def test_the_seed_decides_all(job):
    training = Training(**FEW, seed=3)
    first, second, other = (train(*job, replace(training, seed=seed)) for seed in (3, 3, 4))
    assert same(first, second.state_dict())
    assert not same(first, other.state_dict())


def test_softened_logits_are_compared_by_the_divergence_of_their_probabilities():
    found, dense = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = ((each / 4).softmax(1) for each in (dense, found))
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert baselines.softened([found], [dense]).item() == pytest.approx(expected.item())
    assert baselines.softened([dense + 7], [dense]).item() == pytest.approx(0, abs=1e-12)


def test_adaprune_compares_what_every_pruned_layer_computes(job):
    dense, start, masks, images = job
    error = 0.0
    with torch.no_grad():
        features = [Outputs(model, [])(images)[0] for model in (start, dense)]
        error += (features[0] - features[1]).square().sum() / features[1].square().sum()
        inputs = [F.relu(model.bn(model.stem(images))) for model in (start, dense)]
        stems = [model.stem(images) for model in (start, dense)]
        error += (stems[0] - stems[1]).square().sum() / stems[1].square().sum()
        grouped = [model.grouped(x) for model, x in zip((start, dense), inputs)]
        error += (grouped[0] - grouped[1]).square().sum() / grouped[1].square().sum()
    few = dense, start, {name: masks[name] for name in ("stem", "grouped")}, images
    assert loss(few, start, Training("layers", views=False)) == pytest.approx(error.item())


def test_every_image_of_an_epoch_is_seen_once_and_a_short_batch_never():
    batches = baselines.batches(10, 4, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(3)]
    assert all(len(epoch) == 8 == len(set(epoch.tolist())) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])
    assert next(baselines.batches(3, 8, torch.Generator())).sort().values.tolist() == [0, 1, 2]


def test_a_budget_is_filled_with_steps(job, monkeypatch):
    now, ran = [0.0], []

    def pretend(*arguments):
        training = arguments[4]
        ran.append(training.steps)
        now[0] += 2.0 + 0.5 * training.steps  # seconds: two before the first step

    monkeypatch.setattr(baselines, "train", pretend)
    monkeypatch.setattr(baselines, "clock", lambda device: now[0])
    assert baselines.within(22.0, *job, Training(seed=5)) == Training(seed=5, steps=40)
    assert baselines.within(1.0, *job, Training()).steps == 1
    assert ran == [1, 4, 1, 4]


def test_batch_norm_is_given_the_statistics_of_the_pruned_networks_own_features(job):
    _, start, _, images = job
    before = copies(start)
    model = baselines.reestimated(start, images, batch_size=12)
    with torch.no_grad():
        features = [start.stem(batch) for batch in images.split(12)]
    assert same(start, *before)
    mean = torch.stack([each.mean((0, 2, 3)) for each in features]).mean(0)
    assert model.bn.running_mean.allclose(mean)
    assert model.bn.running_var.allclose(torch.stack([each.var((0, 2, 3)) for each in features]).mean(0))
    assert not model.training
    assert model.stem.weight.equal(start.stem.weight)


def test_a_view_is_its_image_cut_out_of_a_black_border_mirrored_or_not():
    images = torch.randn(20, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    cut = networks.views(images, torch.Generator().manual_seed(1), padding=1)
    wide, mirrored = F.pad(images, [1] * 4, value=networks.BLACK), 0
    for image, view in zip(wide, cut):
        places = [(top, left) for top in range(3) for left in range(3)]
        plain = any(image[:, top : top + 5, left : left + 6].equal(view) for top, left in places)
        flipped = any(image[:, top : top + 5, left : left + 6].flip(-1).equal(view) for top, left in places)
        assert plain or flipped
        mirrored += flipped
    assert 4 < mirrored < 16
    assert networks.views(images, torch.Generator().manual_seed(1), padding=1).equal(cut)
