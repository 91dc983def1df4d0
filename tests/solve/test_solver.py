"""Conjugate gradients, line search and Newton steps against dense references in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import DenseReference, build, matrix

from snows.options import Options
from snows.solve.cg import conjugate_gradients
from snows.solve.curvature import Curvature
from snows.solve.solver import backtrack, solve

NEWTON = Options(newton_steps=1, max_CG_iterations=200, cg_tolerance=1e-12, damping=0.0, batching=False)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), damping=st.sampled_from([0.0, 0.1]), scale=st.floats(-9, 9))
def test_cg_solves_the_damped_system_whatever_its_scale(n, seed, damping, scale):
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**scale
    a = matrix(n, seed)
    result = conjugate_gradients(lambda v: a @ v, b, damping=damping, tolerance=1e-10, max_iterations=10 * n)
    shift = damping * (b @ a @ b) / (b @ b)  # relative to the curvature along the first direction
    expected = torch.linalg.solve(a + shift * torch.eye(n, dtype=torch.float64), b)
    torch.testing.assert_close(result.step, expected, rtol=1e-7, atol=1e-7 * 10**scale)
    torch.testing.assert_close(result.product, a @ result.step, rtol=1e-7, atol=1e-7 * 10**scale)
    assert result.residuals[-1] <= 1e-10


def test_cg_with_the_inverse_as_preconditioner_needs_one_iteration():
    a, b = matrix(9, 0), torch.ones(9, dtype=torch.float64)
    inverse = torch.linalg.inv(a)
    result = conjugate_gradients(lambda v: a @ v, b, lambda r: inverse @ r, tolerance=1e-8)
    assert result.iterations == 1
    torch.testing.assert_close(result.step, inverse @ b)


def test_cg_stops_at_the_relative_tolerance():
    a = matrix(40, 0, lowest=0.001)
    for scale in (1e-8, 1e8):
        b = scale * torch.ones(40, dtype=torch.float64)
        result = conjugate_gradients(lambda v: a @ v, b, tolerance=0.05, max_iterations=100)
        assert result.residuals[-1] <= 0.05 < result.residuals[-2]
        assert (b - a @ result.step).norm() <= 0.05 * b.norm()


def test_cg_with_a_zero_right_side_does_nothing():
    result = conjugate_gradients(lambda v: v, torch.zeros(4, dtype=torch.float64))
    assert result.iterations == 0
    assert torch.equal(result.step, torch.zeros(4, dtype=torch.float64))


def test_cg_stops_at_negative_curvature():
    a = torch.diag(torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64))
    b = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    result = conjugate_gradients(lambda v: a @ v, b)
    assert result.negative_curvature
    assert result.step @ b > 0  # the gradient direction
    torch.testing.assert_close(result.step / result.step.norm(), b / b.norm())
    a = torch.diag(torch.tensor([4.0, 5.0, -0.1], dtype=torch.float64))
    result = conjugate_gradients(lambda v: a @ v, b, tolerance=1e-9)
    assert result.negative_curvature
    assert 0 < result.iterations < 3
    assert torch.isfinite(result.step).all()
    assert result.step @ b > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cg_says_what_is_not_finite_instead_of_passing_it_on(bad):
    right_side = torch.ones(3)
    with pytest.raises(FloatingPointError, match="a curvature product is not finite"):
        conjugate_gradients(lambda v: v * bad, right_side)
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        conjugate_gradients(lambda v: v, right_side * bad)
    with pytest.raises(FloatingPointError, match="a curvature product is not finite"):
        conjugate_gradients(lambda v: v, right_side, lambda residual: residual * bad)


def test_backtracking_halves_until_the_loss_falls_enough():
    def loss(w):
        return (w**4).sum()

    weight, step = torch.tensor([1.0]), torch.tensor([-4.0])  # overshoots: the full step ends at -3
    search = backtrack(loss, weight, step, loss(weight), slope=torch.tensor(-16.0))
    assert search.length == 0.25
    assert search.loss == 0.0
    uphill = backtrack(loss, weight, torch.tensor([1.0]), loss(weight), slope=torch.tensor(-1.0))
    assert uphill.length == 0
    assert uphill.loss == 1.0


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_with_k_0_one_newton_step_is_the_least_squares_solution_on_the_support(tiny, images, curvature):
    objective, dense, _ = build(tiny, images, 0, 0, curvature)
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    theta, stats = solve(objective, dense * mask, mask, None, NEWTON)
    reference = DenseReference(objective, dense * mask)
    support = mask.flatten()
    step = torch.linalg.solve(reference.hessian[support][:, support], -reference.gradient.flatten()[support])
    expected = (dense * mask).flatten()
    expected[support] += step
    torch.testing.assert_close(theta, expected, rtol=1e-5, atol=1e-6)
    assert stats.loss_after < stats.loss_before
    assert stats.loss_after == pytest.approx(objective.loss(theta).item())


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_newton_steps_lower_the_loss_and_stay_on_the_support(tiny, batching, curvature):
    images = torch.randn(24, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective, dense, _ = build(tiny, images, 0, 3, curvature, batch=12)
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    options = NEWTON.but(newton_steps=3, damping=1e-3, max_CG_iterations=10, batching=batching)
    theta, stats = solve(objective, dense * mask, mask, None, options)
    assert stats.loss_after < stats.loss_before
    assert (theta[~mask] == 0).all()
    assert stats.loss_after == pytest.approx(objective.loss(theta).item())


def test_mini_batches_each_get_a_step_the_short_last_one_too(tiny, images):
    objective, dense, _ = build(tiny, images[:3], 0, 2, "ggn", batch=2)
    mask = torch.ones_like(dense, dtype=torch.bool)
    sizes = []
    on = objective.on

    def spy(indices):
        part = on(indices)
        sizes.append(part.images)
        return part

    objective.on = spy
    _, stats = solve(objective, dense * 0.5, mask, None, NEWTON.but(batching=True))
    assert sizes == [2, 1]
    assert stats.newton_steps == 2
    assert len(stats.residuals) == 2


def test_mini_batches_that_hurt_the_whole_are_undone(tiny, images):
    objective, dense, _ = build(tiny, images, 0, 2, "ggn")
    whole = objective.loss
    objective.loss = lambda weight: whole(weight) + (0 if torch.equal(weight, dense * 0.5) else 1e9)
    everywhere = torch.ones_like(dense, dtype=torch.bool)
    theta, stats = solve(objective, dense * 0.5, everywhere, None, NEWTON.but(batching=True))
    assert stats.newton_steps > 0
    assert torch.equal(theta, dense * 0.5)
    assert stats.loss_after == stats.loss_before


def test_a_rejected_step_is_not_written(tiny, images):
    objective, dense, _ = build(tiny, images, 0, 2, "ggn")
    objective.loss = lambda weight: torch.tensor(1e9, dtype=torch.float64)  # no trial is ever good enough
    start = dense * 0.5
    theta, _ = solve(objective, start, torch.ones_like(dense, dtype=torch.bool), None, NEWTON)
    assert torch.equal(theta, start)


def test_a_zero_gradient_leaves_the_weight_as_it_is(tiny, images):
    objective, dense, _ = build(tiny, images, 0, 2, "ggn")
    theta, _ = solve(objective, dense, torch.ones_like(dense, dtype=torch.bool), None, NEWTON)
    torch.testing.assert_close(theta, dense)
    assert torch.isfinite(theta).all()


def test_slope_and_loss_of_the_line_search_come_from_the_same_data(tiny, images):
    """With mini-batches the search runs on the batch of the step: every accepted step lowers that batch's loss."""
    objective, dense, _ = build(tiny, images, 0, 4, "ggn")
    calls = []
    for part in objective.mini_batches():
        here = Curvature(part, dense * 0.5)
        calls.append((here.loss, part.loss(dense * 0.5)))
    for linearised, searched in calls:
        torch.testing.assert_close(linearised, searched)
