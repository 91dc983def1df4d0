"""Images that are held out of the joint steps: which they are, and that these end where they are best on them."""

import csv

import pytest
import torch
from helpers import TinyCNN, randomise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from references import build
from torch import nn

import snows
from snows.calibration.streams import Streams
from snows.cli.run_folder import csv_text, layer_rows
from snows.network.network import Network
from snows.solve.cg import conjugate_gradients
from snows.solve.joint import joint_objective
from snows.solve.solver import EarlyStop, LineSearch


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


@settings(max_examples=50, deadline=None)
@given(count=st.integers(40, 3000), batch_size=st.integers(8, 256))
def test_about_the_share_of_the_images_is_held_out(count, batch_size):
    """Whatever remains in the last mini-batch, and wherever the cuts fall."""
    network, options = Network(randomise(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)))), snows.Options()
    streams = Streams(network, list(torch.ones(count, 1, 1, 1, dtype=torch.float64).split(batch_size)), "cpu")
    streams.fit_jointly(network.layers, options)
    assert len(streams.shared.sizes) >= 8
    objective = joint_objective(network.layers, streams, options).holding_out(0.1)
    assert objective.images + objective.held_out.images == count
    assert 0.04 * count <= objective.held_out.images <= 0.2 * count


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


@given(seed=st.integers(0, 500), share=st.floats(0.01, 1), length=st.sampled_from([0.0, 0.25, 1.0]))
def test_a_step_that_is_too_long_for_what_is_held_out_is_shortened_not_refused(seed, share, length):
    assume(all(abs(length / 2**n - 2 * share) > 1e-6 for n in range(9)))  # where rounding decides
    generator = torch.Generator().manual_seed(seed)
    start, step = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    held, fitted = Quadratic(start + share * step), Quadratic(start + step)
    stop, search = EarlyStop(held, start), LineSearch(length, fitted.loss(start + length * step))
    found = stop.shorten(search, step, fitted, fitted.loss(start))
    longest = next((length / 2**n for n in range(9) if length / 2**n < 2 * share), 0.0) if length else 0.0
    assert found.length == longest
    torch.testing.assert_close(found.loss, fitted.loss(start + longest * step))
    torch.testing.assert_close(stop.loss, held.loss(start + longest * step))


def test_a_step_that_nothing_of_helps_what_is_held_out_is_refused():
    start, step = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    stop, fitted = EarlyStop(Quadratic(-step), start), Quadratic(step)
    found = stop.shorten(LineSearch(1.0, fitted.loss(step)), step, fitted, fitted.loss(start))
    assert (found.length, found.loss) == (0.0, fitted.loss(start))
    assert stop.loss == stop.start


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


def test_a_joint_step_is_as_long_as_what_is_held_out_leaves_it(monkeypatch):
    some = torch.randn(100, 2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = snows.Options(schedule=0, joint_steps=1, held_out=0.3)

    def pruned(**changes):
        found = snows.prune(randomise(TinyCNN()), some, snows.Unstructured(0.3), options.but(**changes))
        return torch.cat([weight.flatten() for weight in found.model.parameters()])

    whole, none = pruned(), pruned(joint_steps=0)
    shorten = EarlyStop.shorten

    def half(stop, search, *job):
        return shorten(stop, LineSearch(search.length / 2, search.loss), *job)

    monkeypatch.setattr(EarlyStop, "shorten", half)
    torch.testing.assert_close(pruned() - none, (whole - none) / 2)
    monkeypatch.setattr(EarlyStop, "shorten", lambda stop, search, direction, fitted, before: LineSearch(0.0, before))
    assert pruned().equal(none)
