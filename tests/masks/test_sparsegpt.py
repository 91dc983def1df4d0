"""SparseGPT against the optimal brain surgeon done with dense inverses, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.masks.patterns import NM
from snows.masks.sparsegpt import INVERSE_DAMPING, choose_mask, update


def problem(seed, out, inputs, kernel=(), groups=1):
    """A random weight (out, inputs / groups, *kernel) and the second moment of its input columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs // groups, *kernel, generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, weight[0].numel(), weight[0].numel(), generator=generator, dtype=torch.float64)
    return weight, mix @ mix.transpose(1, 2) / mix.shape[1]


def surgeon(weight, moment, choose):
    """Exact OBS on each row, column after column: invert A on the columns that are left, and spread the error.

    choose(row, j, what row j's columns are worth from j on) -> whether w_j survives. Columns go channel by channel at
    one kernel position, then the next position.
    """
    order = torch.arange(weight[0].numel()).view(weight.shape[1:]).movedim(0, -1).flatten()
    rows, result = weight.flatten(1)[:, order].clone(), torch.zeros_like(weight.flatten(1))
    for row, w in enumerate(rows):
        a = moment[row * len(moment) // len(rows)][order][:, order]
        a = a + INVERSE_DAMPING * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype)
        for j in range(len(w)):
            inverse = a[j:, j:].inverse()
            worth = torch.stack([w[i] ** 2 / a[i:, i:].inverse()[0, 0] for i in range(j, len(w))])
            if not choose(row, j, worth):
                w[j:] -= w[j] / inverse[0, 0] * inverse[:, 0]
                w[j] = 0
        result[row, order] = w
    return result.view_as(weight)


@pytest.mark.parametrize("shape", [(3, 10), (3, 4, (2, 2)), (4, 4, (1, 3), 2)], ids=str)
def test_the_update_on_a_given_mask_is_exact_obs(shape):
    weight, moment = problem(0, *shape)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    ordered = mask.movedim(1, -1).flatten(1)
    expected = surgeon(weight, moment, lambda row, j, worth: ordered[row, j])
    got = update(weight, moment, mask)
    torch.testing.assert_close(got, expected)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, (2, 2)), (4, 8, (1, 3), 2)], ids=str)
def test_n_m_masks_are_those_of_exact_obs_at_one_kernel_position(shape):
    weight, moment = problem(0, *shape)
    kept = {}

    def choose(row, j, worth):
        if j % 4 == 0:
            best = worth[:4].argsort(descending=True)[:2]
            kept[row] = {j + i for i in best.tolist()}
        return j in kept[row]

    expected = surgeon(weight, moment, choose)
    mask = choose_mask(weight, moment, NM(2, 4))
    assert torch.equal(mask, expected != 0)
    assert (mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    torch.testing.assert_close(update(weight, moment, mask), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_unstructured_masks_remove_what_is_worth_least(groups):
    """Within one block of columns nothing is updated yet: the smallest w^2 / [A_F^-1]_jj of the whole layer go."""
    weight, moment = problem(0, 4, 4 * groups, (2, 2), groups)
    worths = []
    surgeon(weight, moment, lambda row, j, worth: worths.append(worth) or True)
    worth = torch.stack([w[0] for w in worths]).view(4, 2, 2, 4).movedim(-1, 1)
    mask = choose_mask(weight, moment, 30)
    assert (~mask).sum() == 30
    assert worth[~mask].max() < worth[mask].min()


KERNELS = [(), (1, 1), (3, 1)]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 5), st.integers(1, 70), st.floats(0, 1), st.sampled_from([(), (1, 1), (3, 1)])
)
def test_the_pattern_holds_exactly_whatever_the_moment(seed, out, channels, share, kernel):
    weight, moment = problem(seed, out, channels, kernel)
    weight[:, seed % channels] = 0
    moment *= torch.tensor([1.0, 0.0, 1e-20])[seed % 3]
    count = int(share * weight.numel())
    mask = choose_mask(weight, moment, count)
    assert (~mask).sum() == count
    assert torch.isfinite(update(weight, moment, mask)).all()
    if channels % 2 == 0:
        assert (choose_mask(weight, moment, NM(1, 2)).movedim(1, -1).unflatten(-1, (-1, 2)).sum(-1) == 1).all()


def test_blocks_change_nothing_but_when_masks_are_chosen(monkeypatch):
    weight, moment = problem(3, 4, 40)
    mask = choose_mask(weight, moment, 80)
    whole = update(weight, moment, mask)
    monkeypatch.setattr(snows.masks.sparsegpt, "BLOCK", 7)
    torch.testing.assert_close(update(weight, moment, mask), whole)
    smaller = choose_mask(weight, moment, 80)
    assert (~smaller).sum() == 80
    assert not torch.equal(smaller, mask)


def test_its_weights_bring_the_output_closer_than_the_mask_alone():
    weight, moment = problem(5, 6, 32)
    mask = choose_mask(weight, moment, NM(2, 4))

    def error(w):
        return torch.einsum("oi,ij,oj", w - weight, moment[0], w - weight)

    assert error(update(weight, moment, mask)) < 0.7 * error(weight * mask)
