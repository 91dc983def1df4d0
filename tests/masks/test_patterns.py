"""Masks: the pattern holds exactly, whatever the weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snows import NM, Unstructured, UsageError
from snows.masks.allocation import ALLOCATIONS

SHAPES = st.lists(
    st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 9)), st.tuples(*[st.integers(1, 5)] * 4)),
    min_size=1,
    max_size=4,
)


def random_weights(shapes, seed):
    """Random weights, with ties and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=generator) for shape in shapes)
    return {f"layer{i}": (w * 4).round() / 4 if i % 2 else w for i, w in enumerate(draw)}


@settings(max_examples=100, deadline=None)
@given(
    SHAPES, st.integers(0, 99), st.floats(0, 0.999), st.floats(0, 1), st.sampled_from(list(ALLOCATIONS)), st.booleans(),
    st.integers(0, 50), st.booleans(),
)  # fmt: skip
def test_unstructured_removes_exactly_the_share_of_all_parameters(
    shapes, seed, target, cap, allocation, normalise, others, by_row
):
    weights = random_weights(shapes, seed)
    total = sum(w.numel() for w in weights.values()) + others
    pattern = Unstructured(target, cap, allocation, normalise)
    if round(target * total) > sum(int(cap * w.numel()) for w in weights.values()):
        with pytest.raises(UsageError, match="out of reach"):
            pattern.select(weights, total)
        return
    masks = pattern.select(weights, total, by_row).masks
    assert sum((~m).sum().item() for m in masks.values()) == round(target * total)
    for name, mask in masks.items():
        assert (~mask).sum() <= int(cap * mask.numel())
        parts = zip(weights[name], mask) if by_row else [(weights[name], mask)]
        for weight, kept in parts:
            assert not kept.any() or kept.all() or weight[kept].abs().min() >= weight[~kept].abs().max()
        if by_row:
            counts = mask.flatten(1).sum(1)
            assert counts.max() - counts.min() <= 1


def test_global_masks_compare_magnitudes_across_layers():
    weights = {"small": torch.full((4, 4), 0.1), "large": torch.full((4, 4), 1.0)}
    masks = Unstructured(0.5, 1.0).select(weights, 32).masks
    assert not masks["small"].any()
    assert masks["large"].all()
    masks = Unstructured(0.5, 0.75).select(weights, 32).masks  # the cap moves the rest to the other layer
    assert (~masks["small"]).sum() == 12
    assert (~masks["large"]).sum() == 4
    masks = Unstructured(0.5, allocation="uniform").select(weights, 32).masks
    assert [(~m).sum().item() for m in masks.values()] == [8, 8]


def test_normalised_scores_are_shares_of_their_layers_sum():
    weights = {"small": torch.arange(1.0, 17).view(4, 4) / 100, "large": torch.arange(1.0, 17).view(4, 4)}
    masks = Unstructured(0.5, 1.0, normalise=True).select(weights, 32).masks
    assert [(~m).sum().item() for m in masks.values()] == [8, 8]
    weights["zero"] = torch.zeros(4, 4)
    masks = Unstructured(0.5, 1.0, normalise=True).select(weights, 48).masks
    assert [(~m).sum().item() for m in masks.values()] == [4, 4, 16]


def test_erk_keeps_weights_in_proportion_to_the_sum_of_the_dimensions():
    weights = {"small": torch.ones(4, 4, 3, 3), "large": torch.ones(16, 16, 3, 3)}
    masks = Unstructured(0.8, 1.0, "erk").select(weights, 2448).masks
    kept = {name: mask.sum().item() for name, mask in masks.items()}
    proportion = 490 * torch.tensor([14, 38]) / 52
    assert kept == {"small": round(proportion[0].item()), "large": round(proportion[1].item())}
    masks = Unstructured(0.5, 1.0, "erk").select(weights, 2448).masks
    assert masks["small"].all()  # its proportion is more than it has; the large layer makes up for it
    assert (~masks["large"]).sum() == 1224


def test_layers_with_a_sparsity_of_their_own_and_the_others_reach_the_target(caplog):
    weights = {name: torch.randn(10, 10) for name in ("stem", "block.0", "block.1", "head")}
    pattern = Unstructured(0.4, layer_sparsity={"block.*": 0.7, "block.1": 0.25, "stem": "dense"})
    selection = pattern.select(weights, 400)
    removed = {name: (~mask).sum().item() for name, mask in selection.masks.items()}
    assert removed == {"block.0": 70, "block.1": 25, "head": 65}
    assert selection.left_dense == {"stem": "dense, as its rule asks"}
    assert not caplog.text
    everywhere = Unstructured(0.99, layer_sparsity={"*": 0.5}).select(weights, 400)  # the target plays no part
    assert all((~mask).sum() == 50 for mask in everywhere.masks.values())
    assert "50.0 % of all parameters become zero, not the target of 99.0 %" in caplog.text
    with pytest.raises(UsageError, match=r"layer sparsities alone remove 0\.3500"):
        Unstructured(0.3, layer_sparsity={"block.*": 0.7}).select(weights, 400)
    with pytest.raises(UsageError, match=r"layer sparsities: no prunable layer is named blok.*; those are stem, block"):
        Unstructured(0.3, layer_sparsity={"blok.*": 0.7}).select(weights, 400)


def test_layers_with_an_n_m_pattern_of_their_own():
    weights = {name: torch.randn(6, 12) for name in ("stem", "block.0", "block.1")}
    pattern = NM(2, 4, {"block.*": "1:6", "stem": "dense"})
    selection = pattern.select(weights, 0)
    assert selection.left_dense == {"stem": "dense, as its rule asks"}
    for mask in selection.masks.values():
        assert (mask.unflatten(1, (-1, 6)).sum(2) == 1).all()
    assert [str(NM.parse(part.layer_sparsity["block.*"])) for part in pattern.path(2)] == ["3:6", "2:6"]
    assert pattern.path(2)[0].layer_sparsity["stem"] == "dense"


@pytest.mark.parametrize("bad", [1.0, -0.5, float("nan"), True, "half", None, [0.5]])
def test_layer_sparsities_outside_their_range_are_refused(bad):
    with pytest.raises(UsageError, match=r"layer sparsity of fc: .* is neither a share in \[0, 1\) nor 'dense'"):
        Unstructured(0.5, layer_sparsity={"fc": bad})
    with pytest.raises(UsageError, match=r"layer sparsity of fc: .* is neither N:M"):
        NM(2, 4, {"fc": bad})
    with pytest.raises(UsageError, match="4:4 makes no sense"):
        NM(2, 4, {"fc": "4:4"})


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 99), st.integers(1, 8), st.integers(2, 9))
def test_nm_keeps_the_n_largest_of_every_m_input_channels_at_each_position(shapes, seed, n, m):
    if n >= m:
        with pytest.raises(UsageError):
            NM(n, m)
        return
    weights = random_weights(shapes, seed)
    selection = NM(n, m).select(weights, 10**9)
    assert set(selection.masks) | set(selection.left_dense) == set(weights)
    for name, mask in selection.masks.items():
        weight = weights[name].abs()
        for start in range(0, weight.shape[1], m):
            group, kept = weight[:, start : start + m], mask[:, start : start + m]
            assert (kept.sum(1) == n).all()  # at every output and every kernel position
            lowest_kept = group.masked_fill(~kept, torch.inf).amin(1)
            highest_removed = group.masked_fill(kept, -1).amax(1)
            assert (lowest_kept >= highest_removed).all()


def test_nm_leaves_dense_what_it_cannot_group_and_says_so():
    weights = {"depthwise": torch.ones(8, 1, 3, 3), "stem": torch.ones(8, 3, 3, 3), "fc": torch.ones(5, 8)}
    selection = NM(2, 4).select(weights, 0)
    assert list(selection.masks) == ["fc"]
    assert "depthwise" in selection.left_dense["depthwise"]
    assert "3 inputs are not a multiple of 4" in selection.left_dense["stem"]


def test_rows_need_no_multiple_of_three():
    """An attention weight (3 d, d) with d odd is masked in every row."""
    mask = NM(2, 4).mask(torch.randn(3 * 5, 8))
    assert (mask.sum(1) == 4).all()


@pytest.mark.parametrize("bad", [-0.1, 1.0, 2.0, float("nan")])
def test_shares_outside_their_range_are_refused(bad):
    with pytest.raises(UsageError, match="outside"):
        Unstructured(bad)


def test_an_unreachable_target_says_what_can_be_reached():
    with pytest.raises(UsageError, match=r"out of reach.*0\.2500 of all parameters"):
        Unstructured(0.5, 0.5).select({"a": torch.ones(2, 2)}, 8)


def test_the_default_cap_gives_way_where_few_layers_may_be_pruned():
    weights = {name: torch.randn(10, 10) for name in "ab"}
    masks = Unstructured(0.5).select(weights, 380).masks  # 190 of these 200 weights
    assert sum((~mask).sum() for mask in masks.values()) == 190
    assert all((~mask).sum() <= 97 for mask in masks.values())
    with pytest.raises(UsageError, match=r"at most 0.9 of each of the 2 prunable layers, 0.4737"):
        Unstructured(0.5, 0.9).select(weights, 380)
    with pytest.raises(UsageError, match="out of reach"):
        Unstructured(0.5).select(weights, 500)


@given(SHAPES, st.integers(0, 99), st.floats(0.05, 0.9), st.integers(0, 4), st.sampled_from(list(ALLOCATIONS)))
def test_a_path_of_sparsities_ends_below_the_target_and_its_masks_are_nested(shapes, seed, target, steps, allocation):
    weights = random_weights(shapes, seed)
    total = sum(weight.numel() for weight in weights.values())
    pattern = Unstructured(target, max_layer_sparsity=1.0, allocation=allocation)
    path = pattern.path(steps)
    sparsities = [0.0, *(each.target_sparsity for each in path), target]
    assert len(path) == steps
    assert sparsities == sorted(set(sparsities))
    removed = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for each in [*path, pattern]:
        masks = each.select(weights, total).masks
        revived = max((masks[name] & removed[name]).sum() for name in weights)
        assert revived <= (allocation != "global")  # whose counts are rounded layer by layer
        removed = {name: ~mask for name, mask in masks.items()}
        weights = {name: (weight + 0.1) * masks[name] for name, weight in weights.items()}  # solved anew


def test_paths_of_n_m_patterns():
    assert NM(1, 4).path(2) == [NM(3, 4), NM(2, 4)]
    assert NM(2, 4).path(2) == [NM(3, 4)]
    assert NM(2, 8).path(2) == [NM(5, 8), NM(3, 8)]
    assert NM(1, 2).path(3) == NM(3, 4).path(1) == NM(1, 4).path(0) == []


@pytest.mark.parametrize(("target", "rule"), [(0.75, 0.9), (0.8, 0.97), (0.6, 0.8)])
def test_rules_of_most_weights_leave_the_target_in_reach_at_each_sparsity_on_the_way(target, rule):
    """There they remove more than its share of the way; in the end the others lose what is missing."""
    scores = {"small": torch.rand(90, 10), "large": torch.rand(240, 10)}
    pattern, least, short = Unstructured(target, layer_sparsity={"large": rule}), {}, 0
    for stage in [*pattern.path(3), pattern]:
        masks = stage.select(scores, 3300, zeros=least).masks
        least = {name: ~mask for name, mask in masks.items()}
        lost = {name: int(zero.sum()) for name, zero in least.items()}
        assert lost["large"] == round(2400 * stage.layer_sparsity["large"])
        wanted = round(3300 * stage.target_sparsity)
        assert sum(lost.values()) == max(wanted, lost["large"])
        short += lost["large"] > wanted
    assert short
    assert sum(lost.values()) == round(3300 * target)
    with pytest.raises(UsageError, match="out of reach: the layer sparsities alone"):
        Unstructured(0.1, layer_sparsity={"large": rule}).select(scores, 3300)
