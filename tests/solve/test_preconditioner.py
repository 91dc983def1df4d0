"""Input columns, moments and row inverses against dense float64 references."""

import pytest
import torch
from helpers import randomise
from references import build
from torch import nn

from snows.network.inputs import input_columns
from snows.solve.cg import conjugate_gradients
from snows.solve.curvature import Curvature
from snows.solve.preconditioner import RowInverses, input_moment, output_metric, row_inverses


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 4, (3, 2), stride=2, padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding=1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
    ],
    ids=str,
)
def test_columns_are_what_the_weight_multiplies(layer):
    layer = randomise(layer)
    linear = isinstance(layer, nn.Linear)
    x = torch.randn(3, 5, 6, dtype=torch.float64) if linear else torch.randn(3, 6, 8, 7, dtype=torch.float64)
    groups = getattr(layer, "groups", 1)
    rows = layer.weight.flatten(1).unflatten(0, (groups, -1))  # (groups, out / groups, in)
    product = (rows @ input_columns(layer, x)).flatten(0, 1) + layer.bias[:, None]  # (out, positions)
    expected = layer(x).movedim(-1 if linear else 1, 0).flatten(1)
    torch.testing.assert_close(product, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_row_inverses_equal_the_dense_inverse_of_each_rows_support(groups):
    generator = torch.Generator().manual_seed(0)
    out, inputs = 4, 10
    x = torch.randn(groups, inputs, 30, generator=generator, dtype=torch.float64)
    moment = x @ x.transpose(1, 2)
    scale = torch.rand(out, generator=generator, dtype=torch.float64) + 0.5
    mask = torch.rand(out, inputs, generator=generator) < 0.5
    mask[1] = False  # a row that lost everything
    mask[2] = True
    residual = torch.randn(out, inputs, generator=generator, dtype=torch.float64) * mask
    got = RowInverses(moment, scale, mask, damping=0.01)(residual)
    mean = moment.diagonal(dim1=1, dim2=2).mean()
    for row in range(out):
        support = mask[row].nonzero().flatten()
        a = moment[row * groups // out][support][:, support] / mean
        a += 0.01 * torch.eye(len(support), dtype=torch.float64)
        expected = torch.linalg.solve(a, residual[row, support]) / (scale[row] / scale.mean() + 0.01)
        torch.testing.assert_close(got[row, support], expected)
        assert (got[row, ~mask[row]] == 0).all()


def test_blocks_keep_it_symmetric_positive_definite_and_within_the_memory():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 40, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 12, generator=generator) < 0.7
    precondition = RowInverses(
        x @ x.transpose(1, 2), torch.ones(3, dtype=torch.float64), mask, max_bytes=3 * 12 * 8 * 4
    )
    assert sum(inverse.numel() * 8 for _, inverse in precondition.blocks) <= 3 * 12 * 8 * 4
    assert len(precondition.blocks) > 1
    basis = torch.eye(int(mask.sum()), dtype=torch.float64)
    columns_ = []
    for vector in basis:
        full = torch.zeros(3, 12, dtype=torch.float64)
        full[mask] = vector
        columns_.append(precondition(full)[mask])
    dense = torch.stack(columns_)
    torch.testing.assert_close(dense, dense.T)
    assert torch.linalg.eigvalsh(dense).min() > 0


def test_a_singular_moment_still_gives_a_finite_preconditioner():
    ones = torch.ones(1, 6, 6)
    for moment in (ones, torch.zeros(1, 6, 6), 1e-30 * ones):
        got = RowInverses(moment, torch.zeros(2), torch.ones(2, 6, dtype=torch.bool))(torch.ones(2, 6))
        assert torch.isfinite(got).all()


def test_moments_equal_dense_sums(tiny, images):
    objective, _, _ = build(tiny, images, 1, 4, "ggn")
    batches = [objective.inputs(i) for i in range(len(objective))]
    x = torch.cat([values[objective.window.layers[0].node.args[0]] for values in batches])
    patches = torch.nn.functional.unfold(x, 3, padding=1)  # (n, 4 * 9, positions)
    for group, moment in enumerate(input_moment(objective)):
        rows = patches[:, 18 * group : 18 * (group + 1)].transpose(0, 1).flatten(1)
        torch.testing.assert_close(moment, rows @ rows.T)


def test_output_metric_estimates_the_diagonal_that_is_pulled_back(tiny, images):
    objective, weight, _ = build(tiny, images, 0, 4, "ggn")
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(len(objective)):
        values = objective.inputs(i)
        output = objective.window.output(values, *objective.variables.unpack(weight)[0])

        def scaled(y, values=values):
            parts = zip(objective.window.after(values, y), objective.coefficients)
            return torch.cat([c**0.5 * f.flatten() for f, c in parts])

        jacobian = torch.autograd.functional.jacobian(scaled, output, vectorize=True)  # (features, n, c, h, w)
        expected += jacobian.square().sum((0, 1, 3, 4))
    estimates = torch.stack(
        [output_metric(objective, *objective.variables.unpack(weight)[0], seed) for seed in range(300)]
    )
    error = estimates.std(0) / 300**0.5
    assert ((estimates.mean(0) - expected).abs() < 4 * error + 1e-12).all()


def test_it_is_the_exact_inverse_with_k_0(tiny, images):
    """One product where plain CG needs many: every row's curvature is inverted on its own support."""
    objective, dense, _ = build(tiny, images, 2, 0, "ggn")
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(5)) < 0.7
    here = Curvature(objective, dense * mask)
    moment = input_moment(objective)
    exact = RowInverses(
        moment,
        output_metric(objective, *objective.variables.unpack(dense)[0], 0),
        *objective.variables.rows(mask),
        damping=1e-12,
    )
    right_side = -here.gradient * mask
    found = conjugate_gradients(lambda v: here.matvec(v) * mask, right_side, exact, 0.0, 1e-6, 50)
    assert found.iterations == 1
    plain = conjugate_gradients(lambda v: here.matvec(v) * mask, right_side, None, 0.0, 1e-6, 50)
    assert plain.iterations > 2
    torch.testing.assert_close(found.step, plain.step, rtol=1e-3, atol=1e-5)


def test_it_saves_products_on_a_layer_with_depth(tiny, images):
    objective, dense, _ = build(tiny, images, 0, 6, "ggn")
    mask = torch.rand(dense.shape, generator=torch.Generator().manual_seed(5)) < 0.6
    here = Curvature(objective, dense * mask)
    counts = [
        conjugate_gradients(
            lambda v: here.matvec(v) * mask, -here.gradient * mask, precondition, 1e-6, 1e-4, 200
        ).iterations
        for precondition in (row_inverses(objective, dense * mask, mask, 0), None)
    ]
    assert counts[0] < counts[1]
