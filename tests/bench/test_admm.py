"""bench/admm.py: the pattern that its layers end with, and that both its support and its weights are worth it."""

import pytest
import torch
from admm import admm, least_squares, split
from helpers import TinyCNN, randomise

import snows


@pytest.fixture
def problem():
    """(rows (1, 12, 16), the second moment (1, 16, 16) of inputs that go together)"""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(6, 16, generator=generator, dtype=torch.float64)
    inputs += 0.3 * torch.randn(64, 16, generator=generator, dtype=torch.float64)
    rows = torch.randn(1, 12, 16, generator=generator, dtype=torch.float64)
    return rows, (inputs.T @ inputs / 64)[None]


def error(rows, moment, solved):
    return ((solved - rows) @ moment * (solved - rows)).sum().item()


def test_least_squares_leave_no_slope_on_the_support(problem):
    rows, moment = problem
    support = snows.NM(2, 4).mask(rows[0])[None]
    solved = least_squares(rows, moment, support)
    assert not solved[~support].any()
    assert ((solved - rows) @ moment)[support].abs().max() < 1e-9


def test_the_support_is_better_than_that_of_the_largest_weights(problem):
    rows, moment = problem

    def choose(weight):
        return snows.NM(1, 4).mask(weight[0])[None]

    support = split(rows, moment, choose)
    assert support.equal(choose(support.double()))  # as many of each group
    ours, largest = (error(rows, moment, least_squares(rows, moment, each)) for each in (support, choose(rows)))
    assert ours < 0.8 * largest


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.Unstructured(0.6)], ids=str)
def test_a_network_is_pruned_to_its_pattern(pattern):
    model = randomise(TinyCNN())
    images = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    magnitude = snows.prune(model, None, pattern, algo="MP")
    pruned = snows.prune(model, images, pattern, algo=admm(pattern))
    assert not pruned.problems
    for name, mask in magnitude.masks.items():
        found = pruned.model.get_submodule(name).weight != 0
        assert found.sum() == mask.sum()
        assert not isinstance(pattern, snows.NM) or pattern.holds(found)
