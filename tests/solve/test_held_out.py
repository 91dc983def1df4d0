"""Images that are held out: which they are, and that no solution is worse on them than its start."""

import copy
import csv

import pytest
import torch
from helpers import TinyCNN, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from references import build
from torch import nn

import snows
from snows.calibration.streams import Streams
from snows.cli.run_folder import csv_text, layer_rows
from snows.masks.sparsegpt import shortened
from snows.network.layers import Network
from snows.solve.layer import update_layer
from snows.solve.solver import EarlyStop, conjugate_gradients

HALF = snows.Unstructured(0.5, 0.9)


def head(inputs=48, classes=10):
    """A network whose only layer sees one sample an image."""
    return randomise(nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes)))


def images(count, seed, inputs=48):
    """Images whose pixels depend on each other, so that some directions hold little of them."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return (pixels * torch.linspace(2, 0.1, inputs)).view(count, 3, 4, 4) + 0.5


@given(parts=st.integers(1, 9), share=st.floats(0, 0.5))
def test_some_micro_batches_are_held_out_and_the_others_fitted(parts, share):
    objective, _, _ = build(randomise(TinyCNN()), torch.ones(parts, 2, 4, 4, dtype=torch.float64), 0, 1, "ggn", 1)
    fitted = objective.holding_out(share)
    if share == 0 or parts == 1:
        assert fitted is objective
        assert fitted.held_out is None
        return
    held = fitted.held_out.indices
    assert 1 <= len(held) <= max(1, round(share * len(objective)))
    assert sorted(fitted.indices + held) == objective.indices
    assert fitted.held_out.held_out is None


def losses_of_iterates(a, b, held):
    """The held-out loss of each iterate of CG, from as many runs, and the iterates."""
    steps = [conjugate_gradients(lambda v: a @ v, b, tolerance=0.0, max_iterations=i).step for i in range(1, 9)]
    return [held(step).item() for step in steps], steps


class Quadratic:
    """A held-out loss with a minimum at `centre`."""

    def __init__(self, centre):
        self.centre = centre

    def loss(self, theta):
        return (theta - self.centre).square().sum()


@given(seed=st.integers(0, 500), near=st.floats(0, 1))
def test_cg_ends_at_the_iterate_that_is_best_on_what_is_held_out(seed, near):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    a, b = root @ root.T, torch.randn(8, generator=generator, dtype=torch.float64)
    start = torch.randn(8, generator=generator, dtype=torch.float64)
    held = Quadratic(start + near * torch.linalg.solve(a, b) + 0.1 * start.flip(0))
    found, steps = losses_of_iterates(a, b, lambda step: held.loss(start + step))
    stop = EarlyStop(held, start)
    conjugate_gradients(lambda v: a @ v, b, tolerance=0.0, max_iterations=8, watch=stop)
    first = held.loss(start).item()
    best, since, place = first, 0, None
    for i, loss in enumerate(found):
        best, since, place = (loss, 0, i) if loss < best else (best, since + 1, place)
        if since >= 2 and place is not None:
            break
    assert (stop.found is None) == (place is None)
    if stop.found is not None:
        torch.testing.assert_close(stop.found[0], steps[place])
        torch.testing.assert_close(stop.found[1], a @ steps[place])
    assert stop.loss.item() == pytest.approx(min(first, best))
    assert stop.start.item() == pytest.approx(first)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(20, 80), seed=st.integers(0, 99), k_step=st.sampled_from([0, 4]))
def test_no_layer_ends_worse_than_it_began_on_what_was_held_out(count, seed, k_step):
    model, options = head(), snows.Options(schedule=0, joint_steps=0, k_step=k_step, held_out=0.2, seed=seed)
    (record,) = snows.prune(model, images(count, seed), HALF, options).layers
    assert record.held_out_after <= record.held_out_before
    if record.held_out_after == record.held_out_before:
        assert record.loss_after == record.loss_before


@pytest.mark.parametrize("algo", ["SNOWS", "MP+"])
@pytest.mark.parametrize("count", [24, 32, 64])
def test_a_head_that_few_images_are_solved_on_is_better_on_others(algo, count):
    """The fault: more inputs than images, so that the head fitted them by heart."""
    model, unseen = head(), images(500, seed=100)

    def error(pruned):
        wanted = model(unseen)
        return ((pruned.model(unseen) - wanted).square().sum() / wanted.square().sum()).item()

    options = snows.Options(schedule=0, joint_steps=0, cg_tolerance=1e-6, max_CG_iterations=50)
    masked = error(snows.prune(model, None, HALF, algo="MP"))
    held = error(snows.prune(model, images(count, 1), HALF, options.but(held_out=0.2), algo=algo))
    by_heart = error(snows.prune(model, images(count, 1), HALF, options.but(held_out=0.0), algo=algo))
    assert held < by_heart or held < 0.05
    assert held < masked


def test_layers_with_many_samples_are_solved_on_all_the_images():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten()))
    options = snows.Options(schedule=0, joint_steps=0)
    pruned = snows.prune(model, images(64, 0), snows.NM(1, 2, {"0": "dense"}), options)
    without = snows.prune(model, images(64, 0), snows.NM(1, 2, {"0": "dense"}), options.but(held_out=0.0))
    assert torch.equal(pruned.model[2].weight, without.model[2].weight)
    assert all(record.held_out_after != record.held_out_after for record in pruned.layers)  # NaN: none were


def test_joint_steps_stop_where_what_is_held_out_is_best():
    model = randomise(TinyCNN())
    some = torch.randn(100, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = snows.Options(schedule=0, joint_steps=6, joint_CG_iterations=20, held_out=0.3)
    pruned = snows.prune(model, some, snows.Unstructured(0.3), options)
    joint = [record for record in pruned.layers if record.joint]
    assert joint
    assert all(record.held_out_after <= record.held_out_before for record in joint)
    assert all(record.loss_after < record.loss_before for record in joint)
    rows = list(csv.DictReader(csv_text(layer_rows(pruned.layers)).splitlines()))
    assert float(rows[0]["held_out_after_2"]) == joint[0].held_out_after


def test_the_loss_of_the_record_is_that_of_the_images_that_were_held_out():
    model, some = head(), images(40, 5)
    network, options = Network(copy.deepcopy(model)), snows.Options(held_out=0.2, k_step=0, joint_steps=0)
    streams = Streams(network, [some], "cpu", options)
    (layer,) = network.layers
    mask = model[1].weight.abs() > model[1].weight.abs().median()
    streams.fit_layer(layer, mask, options)
    update = update_layer(layer, mask, streams, options)
    sizes = [len(batch) for batch in streams.batches]
    held = [(2 * i + 1) * len(sizes) // 4 for i in range(2)]  # a fifth of eight parts, spread
    x = torch.cat([batch for i, batch in enumerate(streams.batches) if i in held])
    with torch.no_grad():
        wanted = model(x)
        found = nn.functional.linear(x.flatten(1), update.weight, model[1].bias + update.bias_update)
    error = ((found - wanted).square().sum() / wanted.square().sum()).item()
    assert update.stats.held_out_after == pytest.approx(error)
    assert len(sizes) >= 8


@pytest.mark.parametrize("groups", [1, 2])
def test_sparsegpt_goes_as_far_as_the_other_images_say(groups):
    generator = torch.Generator().manual_seed(groups)
    start, end, dense = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    columns = torch.randn(groups, 6, 40, generator=generator, dtype=torch.float64)

    def error(weight):
        change = (weight - dense).unflatten(0, (groups, -1))
        return (change @ columns).square().sum().item()

    found = shortened(dense, start, end, columns @ columns.mT / 40)
    lengths = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert error(found) <= min(error(start + length * (end - start)) for length in lengths) * (1 + 1e-9)


def test_sparsegpt_on_few_images_is_better_on_others():
    model, unseen = head(), images(500, seed=100)

    def error(held_out):
        options = snows.Options(held_out=held_out)
        pruned = snows.prune(model, images(40, 1), HALF, options, algo="SparseGPT")
        return (pruned.model(unseen) - model(unseen)).square().sum().item()

    assert error(0.2) < error(0.0)
