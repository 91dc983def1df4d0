"""The search for an order of channels: never worse than none, hard to improve on, one order for all that read it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.masks.order import NOISE, Reading, Search, best_order


def reading(out, channels, n, m, seed=0):
    columns = torch.rand(channels, out, generator=torch.Generator().manual_seed(seed))
    return Reading(columns / columns.sum(), n, m)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 5), st.integers(1, 5), st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 5)])
)
def test_an_order_is_a_permutation_that_never_keeps_less(seed, out, groups, pattern):
    read = reading(out, groups * pattern[1], *pattern, seed)
    order, before, after = best_order([read], seed)
    assert sorted(order.tolist()) == list(range(groups * pattern[1]))
    assert 0 < before <= after <= 1 + 1e-6
    score = read.columns[order].T
    assert score[snows.NM(*pattern).mask(score)].sum().item() == pytest.approx(after, rel=1e-5)
    assert read.kept(torch.arange(len(order))) == before


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_of_a_few_channels_the_best_order_is_found(pattern, seed):
    read = reading(6, 8, *pattern, seed)
    orders = torch.tensor([(0, *rest) for rest in itertools.permutations(range(1, 8))])  # the first group is as good
    kept = read.columns[orders.view(-1, 8 // read.m, read.m)].topk(read.n, dim=2).values.sum((1, 2, 3))
    assert best_order([read])[2] == pytest.approx(kept.max().item(), rel=1e-6)


def test_what_an_exchange_gains_is_what_it_is_said_to_gain_and_in_the_end_none_gains():
    readings = [reading(7, 12, 2, 4), reading(3, 12, 1, 3, seed=1)]
    search = Search(readings, torch.arange(12), 0)

    def gain(one, other):
        order = search.order.clone()
        order[[one, other]] = order[[other, one]]
        return sum(read.kept(order) for read in readings) - sum(read.kept(search.order) for read in readings)

    for climbed in (False, True):
        one_way = sum(search.gains)[:, search.order]
        for one, other in itertools.combinations(range(12), 2):
            told = (one_way[one, other] + one_way[other, one]).item()
            assert told == pytest.approx(gain(one, other), abs=1e-6)
            assert not climbed or told <= NOISE * search.kept / 12
        search.climb()


def test_channels_that_belong_together_are_brought_apart():
    columns = torch.cat([torch.ones(4, 3), torch.zeros(12, 3)])
    assert best_order([Reading(columns / columns.sum(), 1, 4)])[1:] == pytest.approx((0.25, 1.0))


def test_two_layers_share_an_order_that_is_best_for_both_together():
    one, other = torch.zeros(8, 1), torch.zeros(8, 1)
    one[:4], other[[0, 1, 4, 5]] = 1 / 4, 1 / 4
    order, before, after = best_order([Reading(torch.cat([one, other], 1), 2, 4)])
    assert (before, after) == pytest.approx((0.5 + 1, 2))
    assert order.tolist() != list(range(8))
    assert best_order([Reading(one, 2, 4), Reading(other, 2, 4)])[2] == pytest.approx(2)


def test_of_many_channels_each_stays_among_its_neighbours(monkeypatch):
    monkeypatch.setattr("snows.masks.order.EFFORT", 1e5)
    order, before, after = best_order([reading(5, 96, 2, 4)])
    assert after > before
    assert torch.equal(order.view(-1, 32).sort().values, torch.arange(96).view(-1, 32))
