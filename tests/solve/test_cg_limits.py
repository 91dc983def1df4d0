"""Conjugate gradients at the end of what a number type can tell: solved systems, vanishing and huge numbers."""

import pytest
import torch
from helpers import TinyCNN, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.solve.cg import conjugate_gradients

TYPES = [torch.float32, torch.float64]


def systems(n, dtype):
    """(n, n) matrices that CG solves exactly in a few iterations, or not at all."""
    row = torch.arange(1, n + 1, dtype=dtype)
    some = torch.ones(n, dtype=dtype)
    some[n // 2 :] = 0
    return {
        "identity": torch.eye(n, dtype=dtype),
        "two eigenvalues": torch.diag(1 + some),
        "rank one": torch.outer(row, row),
        "projection": torch.diag(some),
        "zero": torch.zeros(n, n, dtype=dtype),
        "many eigenvalues": torch.diag(row),
    }


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 6),
    kind=st.sampled_from(list(systems(1, torch.float32))),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 100),
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30), st.integers(-3, 3)),
    damping=st.sampled_from([0.0, 1e-3]),
    preconditioned=st.booleans(),
)
def test_cg_without_a_tolerance_ends_with_the_iterate(n, kind, dtype, seed, exponents, damping, preconditioned):
    size, scale, stretch = (10.0**exponent for exponent in exponents)
    a = systems(n, dtype)[kind] * scale
    b = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * size
    diagonal = torch.linspace(1, 2, n, dtype=dtype) * stretch
    precondition = (lambda r: r / diagonal) if preconditioned else None
    z = b if precondition is None else precondition(b)
    tiny, huge = torch.finfo(dtype).tiny / torch.finfo(dtype).eps, torch.finfo(dtype).max * torch.finfo(dtype).eps
    exact = [b.double().square().sum(), z.double() @ b.double(), z.double().square().sum(), a.double().abs().max()]
    exact += [z.double() @ a.double() @ z.double(), b.double().abs().min() / a.double().abs().max()]
    try:
        result = conjugate_gradients(lambda v: a @ v, b, precondition, damping, tolerance=0.0, max_iterations=30)
    except FloatingPointError:  # numbers that the type cannot square, from the beginning
        blown_up = (
            kind in ("rank one", "projection") and exponents[1] > 12
        )  # by rounding, along what the matrix does not see
        assert max(exact) > huge or min(each for each in exact if each > 0) < tiny or blown_up
        return
    assert result.step.isfinite().all()
    assert len(result.residuals) <= 30
    solvable = kind in ("identity", "two eigenvalues", "many eigenvalues")
    if solvable and max(exact) < huge and min(exact) > tiny:
        shift = damping * float(exact[4] / exact[2])
        expected = torch.linalg.solve(a.double() + shift * torch.eye(n, dtype=torch.float64), b.double())
        off = (result.step.double() - expected).norm() / expected.norm()
        assert off < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_stops_at_the_precision_of_its_numbers(dtype, preconditioned):
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    inverse = (lambda r: r / a.diagonal()) if preconditioned else None
    result = conjugate_gradients(lambda v: a @ v, torch.ones(3, dtype=dtype), inverse, tolerance=0.0, max_iterations=99)
    assert result.iterations <= 5
    assert not result.negative_curvature
    torch.testing.assert_close(result.step, 1 / a.diagonal())


def test_a_product_that_is_not_finite_is_an_error_at_any_iteration():
    a = torch.diag(torch.linspace(1, 9, 9))
    for spoilt in (1, 2, 4):
        products = []

        def product(v, products=products, spoilt=spoilt):
            products.append(v)
            return a @ v * (float("nan") if len(products) == spoilt else 1)

        with pytest.raises(FloatingPointError, match="a curvature product is not finite"):
            conjugate_gradients(product, torch.ones(9), tolerance=0.0)


@pytest.mark.parametrize("preconditioner", ["rows", "none"])
def test_layers_solved_to_the_end_in_single_precision_are_solved(images, preconditioner):
    """Hundreds of products a layer, and no tolerance: far more than single precision can use."""
    options = snows.Options(
        schedule=0, cg_tolerance=0.0, max_CG_iterations=300, preconditioner=preconditioner, joint_CG_iterations=100
    )
    pruned = snows.prune(randomise(TinyCNN()).float(), images.float(), snows.NM(1, 2), options)
    assert pruned.problems == {}
    assert all(record.loss_after < record.loss_before for record in pruned.layers[1:])
