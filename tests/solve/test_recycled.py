"""The preconditioner that remembers products, against the dense formula and against CG that never stopped."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import build_jointly, matrix
from torch import nn

import snows
from snows import budget
from snows.budget import Budget
from snows.calibration.streams import Streams
from snows.memory import GIB
from snows.network.network import Network
from snows.solve.cg import conjugate_gradients
from snows.solve.joint import update_jointly
from snows.solve.recycled import Recycled
from snows.solve.solver import solve


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), count=st.integers(0, 6), most=st.integers(0, 6), seed=st.integers(0, 1000))
def test_it_is_the_update_of_bfgs_by_the_last_products(n, count, most, seed):
    a, h, directions = matrix(n, seed), matrix(n, seed + 1), random(count, n, seed=seed)
    recycled = Recycled(lambda r: h @ r, most)
    product = recycled.noting(lambda v: a @ v)
    for p in directions:
        torch.testing.assert_close(product(p), a @ p)
    torch.testing.assert_close(recycled(torch.ones(n, dtype=torch.float64)), h.sum(1))  # not before it learns
    recycled.learn()
    expected, one = h, torch.eye(n, dtype=torch.float64)
    for p in directions[max(0, count - most) :]:
        rho, y = 1 / (p @ a @ p), a @ p
        expected = (one - rho * p.outer(y)) @ expected @ (one - rho * y.outer(p)) + rho * p.outer(p)
    found = torch.stack([recycled(e) for e in one], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if count and most:
        torch.testing.assert_close(found @ a @ directions[-1], directions[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precondition", [None, lambda r: r * torch.linspace(1, 5, 30, dtype=torch.float64)])
def test_cg_that_begins_again_goes_on_where_it_stopped(precondition):
    a, b, recycled = matrix(30, 0, lowest=1e-3), random(30), Recycled(precondition, 20)
    whole = conjugate_gradients(lambda v: a @ v, b, precondition, tolerance=0, max_iterations=12).step
    x, forgetful = torch.zeros_like(b), torch.zeros_like(b)
    for _ in range(3):
        part = conjugate_gradients(recycled.noting(lambda v: a @ v), b - a @ x, recycled, tolerance=0, max_iterations=4)
        x += part.step
        recycled.learn()
        forgetful += conjugate_gradients(
            lambda v: a @ v, b - a @ forgetful, precondition, tolerance=0, max_iterations=4
        ).step
    torch.testing.assert_close(x, whole, rtol=1e-8, atol=1e-8)
    lowered, without = (b @ found - found @ a @ found / 2 for found in (x, forgetful))
    assert lowered > 1.5 * without


def test_directions_without_positive_curvature_are_left_out():
    recycled = Recycled(None, 5)
    product = recycled.noting(lambda v: v * torch.tensor([1.0, -1.0, 0.0]))
    for p in torch.eye(3):
        product(p)
    recycled.learn()
    assert [p.tolist() for p, _, _ in recycled.pairs] == [[1, 0, 0]]


def linear(images):
    """An objective that is quadratic: a line of linear maps whose last one alone is solved."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 12)).double()
    for p in model.parameters():
        p.data = random(*p.shape, seed=p.ndim)
    return build_jointly(model, images, snows.Options(biases=False))


@pytest.mark.parametrize("batching", [False, True])
def test_newton_steps_on_a_quadratic_loss_come_to_one_of_as_many_products(images, batching):
    objective, dense, _ = linear(images)
    support, start = random(dense.numel(), seed=5) > 0, torch.zeros_like(dense)
    how = snows.Options(damping=0.0, cg_tolerance=0.0, newton_steps=1, max_CG_iterations=3, batching=batching)

    def loss(**changes):
        return objective.loss(solve(objective, start, support, None, how.but(**changes))[0]).item()

    many, again, forgetful = loss(max_CG_iterations=6), loss(newton_steps=2), loss(newton_steps=2, recycle=0)
    if batching:  # each mini-batch has a matrix of its own
        assert again == forgetful
    else:
        assert again == pytest.approx(many, rel=1e-9)
        assert again < forgetful * 0.99


def test_joint_steps_recycle_what_the_memory_holds(tiny, images, monkeypatch):
    """As many products as there is room for; none, where there is none."""
    network = Network(tiny)
    masks = {layer.name: random(*layer.shape) > 0 for layer in network.layers}
    options = snows.Options(joint_steps=3, joint_CG_iterations=2, min_samples=0.0)

    def loss(recycle):
        streams = Streams(Network(copy.deepcopy(tiny)), list(images.split(2)), "cpu")
        return update_jointly(streams.network.layers, masks, streams, options.but(recycle=recycle))[0].stats.loss_after

    forgetful = loss(0)
    assert loss(20) < forgetful
    monkeypatch.setattr(budget, "RECYCLED", 0)
    assert loss(20) == forgetful


def test_a_pair_of_the_step_at_hand_has_room_too():
    budget = Budget(64 * GIB, 64 * GIB)
    assert budget.recycled(20, 2**20) == 20
    assert budget.recycled(20, 100 * 2**20) == 5
    assert budget.recycled(20, GIB) == 0
