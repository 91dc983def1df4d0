"""A network that is sparse already: its zeros stay zeros under every pattern, or the run says that they may not."""

import logging

import pytest
import torch
from helpers import TinyCNN, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snows
from snows.masks.allocation import ALLOCATIONS
from snows.masks.sparsegpt import choose_mask
from snows.network.layers import Masks

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4)
FAST = snows.Options(k_step=2, batch_size=5, schedule=1, joint_steps=1, max_CG_iterations=2, joint_CG_iterations=2)
PATTERNS = [snows.NM(1, 2), snows.Unstructured(0.5, allocation="uniform"), snows.Unstructured(0.6)]


@torch.no_grad()
def sparse() -> TinyCNN:
    """A network whose layers have lost weights at random, some more, some less."""
    model = randomise(TinyCNN())
    generator = torch.Generator().manual_seed(3)
    for layer, share in ((model.stem, 0.7), (model.grouped, 0.3), (model.gate, 0.6), (model.fc, 0.3)):
        layer.weight[torch.rand(layer.weight.shape, generator=generator) < share] = 0
    return model


def zeros_of(model: nn.Module, names) -> Masks:
    return {name: model.get_parameter(f"{name}.weight") == 0 for name in names}


def revived(model: nn.Module, pruned: snows.Pruned) -> int:
    """How many weights were zero and are no longer."""
    zeros = zeros_of(model, pruned.masks)
    return sum(int((pruned.model.get_parameter(f"{name}.weight")[zero] != 0).sum()) for name, zero in zeros.items())


@pytest.mark.parametrize("mask_alg", ["MP", "Wanda", "SparseGPT", "ALPS", "OBS"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_what_is_zero_stays_zero_and_only_that_is_lost_besides(images, pattern, mask_alg):
    model = sparse()
    pruned = snows.prune(model, images, pattern, FAST, mask_alg=mask_alg)
    assert pruned.masks
    assert revived(model, pruned) == 0
    assert not any((mask & zeros_of(model, pruned.masks)[name]).any() for name, mask in pruned.masks.items())
    if isinstance(pattern, snows.NM):
        assert all(pattern.holds(mask) for mask in pruned.masks.values())
    assert all(mask.any() for mask in pruned.masks.values())
    chosen = snows.choose_masks(model, images, pattern, FAST, mask_alg=mask_alg)
    again = snows.prune(model, images, chosen, FAST)
    assert all(torch.equal(mask, pruned.masks[name]) for name, mask in again.masks.items())


@pytest.mark.parametrize("mask_alg", ["MP", "SparseGPT", "ALPS"])
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=repr)
def test_without_it_they_come_back_and_a_line_says_so(images, pattern, mask_alg, caplog):
    model = sparse()
    how = dict(mask_alg=mask_alg, keep_zeros=False)
    pruned = snows.prune(model, images, pattern, FAST, **how)
    assert revived(model, pruned) > 0
    assert "of 4 layers, and may come back (`keep_zeros`)" in caplog.text
    chosen = snows.choose_masks(model, images, pattern, FAST, **how)
    assert revived(model, snows.prune(model, images, chosen, FAST)) > 0


@settings(max_examples=60, deadline=None)
@given(
    SHAPES, st.integers(0, 99), st.floats(0, 0.99), st.floats(0, 0.9), st.sampled_from(list(ALLOCATIONS)), st.booleans()
)
def test_zeros_count_towards_the_target_to_the_weight(shapes, seed, share, target, allocation, by_row):
    generator = torch.Generator().manual_seed(seed)
    weights = {str(i): torch.randn(shape, generator=generator).round(decimals=1) for i, shape in enumerate(shapes)}
    zeros = {name: torch.rand(w.shape, generator=generator) < share for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    lost = sum(int(zero.sum()) for zero in zeros.values())
    masks = snows.Unstructured(target, 1.0, allocation).select(weights, total, by_row, zeros).masks
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert not any((masks[name] & zero).any() for name, zero in zeros.items())
    wanted = max(round(target * total), lost)
    assert removed == wanted
    for name, mask in masks.items() if by_row else ():
        lost = (~mask).flatten(1).sum(1)
        more = lost[lost > zeros[name].flatten(1).sum(1)]  # rows that lose more than was zero already lose alike
        assert not len(more) or (more.max() - more.min() <= 1 and lost[lost < more.min() - 1].numel() == 0)


def test_zeros_in_some_of_the_blocks_count_in_sparsegpts_choice_too():
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(4, 300, dtype=torch.bool)
    zero[:, :120] = True  # nearly all of the first of three blocks
    mask = choose_mask(weight, torch.eye(300, dtype=torch.float64)[None], 600, zero)
    assert (~mask).sum() == 600
    assert not (mask & zero).any()
    assert 0 < (~mask[:, 256:]).sum() < mask[:, 256:].numel()


def test_zeros_of_layers_with_rules_count_too():
    weights = {"a": torch.ones(4, 4), "b": torch.ones(4, 4), "c": torch.ones(4, 4)}
    zeros = {"a": torch.arange(16).view(4, 4) < 8, "c": torch.arange(16).view(4, 4) < 2}
    pattern = snows.Unstructured(0.5, 1.0, layer_sparsity={"a": 0.25, "c": "dense"})
    selection = pattern.select(weights, 48, zeros=zeros)
    assert {name: int((~mask).sum()) for name, mask in selection.masks.items()} == {"a": 8, "b": 16}
    assert selection.left_dense.keys() == {"c"}


def test_a_line_says_how_many_stay(images, caplog):
    caplog.set_level(logging.INFO, "snows")
    model = sparse()
    count = sum(int(zero.sum()) for zero in zeros_of(model, ["stem", "grouped", "gate", "fc"]).values())
    snows.prune(model, None, snows.NM(1, 2), algo="MP")
    assert caplog.text.count(f"{count} weights are zero already, in 4 of 4 layers, and stay zero") == 1


def test_a_dense_network_and_single_zeros_say_nothing_and_change_nothing(tiny, caplog):
    caplog.set_level(logging.INFO, "snows")
    with torch.no_grad():
        tiny.grouped.weight.copy_(torch.ones(4, 2, 3, 3))
        few = nn.Linear(4, 64).double()
        few.weight[0, :2] = 0
    tiny.fc = few
    mask = snows.choose_masks(tiny, None, snows.NM(3, 4)).masks["fc"]
    assert mask[0].sum() == 3  # one of two zeros among 256 weights is kept, as of any weights
    assert "zero" not in caplog.text


def test_a_layer_of_zeros_alone_is_left_dense(tiny, images):
    nn.init.zeros_(tiny.fc.weight)
    pruned = snows.prune(tiny, images, snows.Unstructured(0.5), FAST)
    assert pruned.left_dense["fc"] == "all its weights are zero"
    assert not pruned.problems
    assert (pruned.model.fc.weight == 0).all()
    assert pruned.sparsity == pytest.approx(0.5, abs=0.01)


def test_masks_of_the_callers_own_win_and_a_line_says_what_may_come_back(images, caplog):
    model = sparse()
    stem, zero = model.stem.weight > 0, model.gate.weight == 0
    pruned = snows.prune(model, images, {"stem": stem, "gate": torch.ones_like(zero)}, FAST)
    assert (pruned.model.gate.weight[zero] != 0).any()
    assert f"{int(zero.sum())} weights are zero already, in 1 of 2 layers, and the masks keep them" in caplog.text
    caplog.clear()
    assert revived(model, snows.prune(model, images, {"stem": stem, "gate": ~zero}, FAST)) == 0
    assert not caplog.text


def test_what_decides_nothing_or_is_no_decision_is_refused(tiny, images):
    with pytest.raises(snows.UsageError, match="keep_zeros must be bool"):
        snows.prune(tiny, images, snows.NM(1, 2), keep_zeros="no")
    chosen = snows.choose_masks(tiny, None, snows.NM(1, 2))
    with pytest.raises(snows.UsageError, match="the masks are given: `keep_zeros`"):
        snows.prune(tiny, images, chosen, keep_zeros=False)
