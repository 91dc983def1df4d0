"""ALPS: masks that keep to the pattern, and are better for the layer than the largest weights and SparseGPT's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.masks import alps, sparsegpt
from snows.masks.sparsegpt import INVERSE_DAMPING, damped


def problem(seed, groups=1, kernel=()):
    """(weight (12, 16 / groups, *kernel), the second moment of inputs that go together)"""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 16 // groups, *kernel, generator=generator, dtype=torch.float64)
    width = weight[0].numel()
    inputs = torch.randn(groups, 64, 6, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(groups, 6, width, generator=generator, dtype=torch.float64)
    inputs += 0.3 * torch.randn(groups, 64, width, generator=generator, dtype=torch.float64)
    return weight, inputs.mT @ inputs / 64


def error(weight, moment, mask):
    """Of the layer's output, once each row is solved on its support by dense least squares."""
    a, total = damped(moment, INVERSE_DAMPING), 0.0
    for i, (row, kept) in enumerate(zip(weight.flatten(1), mask.flatten(1))):
        own = a[i * len(a) // len(weight)]
        solved = torch.zeros_like(row)
        solved[kept] = torch.linalg.solve(own[kept][:, kept], (own @ row)[kept])
        total += ((solved - row) @ own @ (solved - row)).item()
    return total


@given(
    seed=st.integers(0, 99),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([(), (3,), (2, 2)]),
    rule=st.sampled_from([snows.NM(2, 4), snows.NM(1, 4), 0, 50, 90]),
    zeros=st.booleans(),
)
@settings(max_examples=40)
def test_masks_keep_to_the_pattern_and_to_what_is_zero(seed, groups, kernel, rule, zeros):
    weight, moment = problem(seed, groups, kernel)
    zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.2 if zeros else None
    mask = alps.choose_mask(weight, moment, rule, zero)
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    assert zero is None or not mask[zero].any()
    if isinstance(rule, snows.NM):
        assert rule.holds(mask)
        assert zeros or mask.sum() == mask.numel() * rule.n / rule.m
    else:
        assert (~mask).sum() == max(rule, 0 if zero is None else int(zero.sum()))


@pytest.mark.parametrize("rule", [snows.NM(1, 4), snows.NM(2, 4)], ids=str)
def test_masks_are_better_for_the_layer_than_the_largest_weights_and_sparsegpts(rule):
    ours, largest, surgeon = 0.0, 0.0, 0.0
    for seed in range(5):
        weight, moment = problem(seed)
        ours += error(weight, moment, alps.choose_mask(weight, moment, rule))
        largest += error(weight, moment, rule.mask(weight))
        surgeon += error(weight, moment, sparsegpt.choose_mask(weight, moment, rule))
    assert ours < 0.8 * largest
    assert ours < surgeon


def test_inputs_that_are_always_zero_do_no_harm():
    weight, moment = problem(0)
    moment[:, 3] = moment[:, :, 3] = 0
    assert snows.NM(2, 4).holds(alps.choose_mask(weight, moment, snows.NM(2, 4)))
    assert snows.NM(2, 4).holds(alps.choose_mask(weight, torch.zeros_like(moment), snows.NM(2, 4)))
