"""Masks chosen once and handed on, a network traced once, and methods of one's own."""

import copy
import gc
import itertools
import time
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import randomise

import snows
from snows.methods import METHODS, Method
from snows.network import network as traced_network
from snows.solve.layer import Update

PATTERNS = [snows.NM(2, 4), snows.NM(1, 2), snows.Unstructured(0.5)]


def fast(**changes):
    return snows.Options(
        **{"batch_size": 2, "schedule": 1, "joint_steps": 1, "max_CG_iterations": 3, "min_samples": 0, **changes}
    )


def assert_same(one, other):
    for (name, ours), reference in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, reference), name
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    assert one.left_dense == other.left_dense


@pytest.mark.parametrize("mask_alg", ["MP", "Wanda", "SparseGPT", "ALPS", "OBS"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_that_were_chosen_before_prune_to_the_same_bits(tiny, images, pattern, mask_alg):
    how = dict(mask_alg=mask_alg, layers=lambda name: name != "fc")
    whole = snows.prune(tiny, images, pattern, fast(), **how)
    chosen = snows.choose_masks(tiny, images, pattern, fast(), **how)
    assert "fc" not in chosen.masks
    assert_same(snows.prune(tiny, images, chosen, fast()), whole)


def test_magnitude_masks_need_no_images(tiny, images):
    chosen = snows.choose_masks(tiny, None, snows.NM(1, 2))
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(schedule=0))
    assert all(torch.equal(mask, pruned.masks[name]) for name, mask in chosen.masks.items())
    assert_same(snows.prune(tiny, None, chosen, algo="MP"), snows.prune(tiny, None, snows.NM(1, 2), algo="MP"))


def test_a_network_is_traced_and_checked_once_and_stays_as_it_is(tiny, images, monkeypatch):
    traced, trace = [], traced_network.trace_somehow
    monkeypatch.setattr(traced_network, "trace_somehow", lambda *given: traced.append(given) or trace(*given))
    network = snows.Network(tiny)
    before = copy.deepcopy(network.model.state_dict())
    chosen = snows.choose_masks(network, images, snows.NM(1, 2), fast())
    first, second = (snows.prune(network, images, chosen, fast()) for _ in range(2))
    assert len(traced) == 1
    assert_same(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
    assert_same(first, snows.prune(tiny, images, snows.NM(1, 2), fast()))
    assert type(first.model) is type(tiny)


def test_masks_of_layers_that_cannot_be_followed_are_dropped(images):
    class Decides(torch.nn.Module):
        """Reads its first layer's weight where the trace does not see it."""

        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(2, 2, 1), torch.nn.Conv2d(2, 2, 1)

        def forward(self, x):
            scale = dict(self.first.named_parameters())["weight"].abs().mean()
            return self.second(torch.tanh(self.first(x) * scale)).flatten(1)

    model = randomise(Decides())
    chosen = snows.choose_masks(model, None, snows.NM(1, 2))
    assert set(chosen.masks) == {"first", "second"}
    assert set(snows.choose_masks(model, images, snows.NM(1, 2)).masks) == {"second"}
    pruned = snows.prune(model, images, chosen, fast())
    assert set(pruned.masks) == {"second"}
    assert "the trace has frozen" in pruned.left_dense["first"]
    # The others make up for what it does not lose.
    target, options = snows.Unstructured(0.3), fast(schedule=0)
    wanted = snows.prune(model, images, target, options)
    assert wanted.sparsity == pytest.approx(0.3, abs=0.05)
    assert_same(snows.prune(model, images, snows.choose_masks(model, None, target), options), wanted)


@pytest.mark.parametrize("algo", METHODS)
def test_masks_do_not_depend_on_the_method(tiny, images, algo):
    how = dict(mask_alg="OBS")
    whole = snows.prune(tiny, images, snows.Unstructured(0.5), fast(schedule=0), algo=algo, **how)
    chosen = snows.choose_masks(tiny, images, snows.Unstructured(0.5), fast(schedule=0), **how)
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in chosen.masks.items())


def test_a_selection_is_checked(tiny, images):
    chosen = snows.choose_masks(tiny, None, snows.NM(1, 2))
    for arguments, message in (
        ((snows.Selection(chosen.masks),), "was not made by snows.choose_masks"),
        ((replace(chosen, masks={"other": chosen.masks["fc"]}),), "which are not prunable layers"),
        ((replace(chosen, masks={"fc": chosen.masks["stem"]}),), "masks of the wrong shape"),
    ):
        with pytest.raises(snows.UsageError, match=message):
            snows.prune(tiny, images, *arguments)
    for extra in ({"mask_alg": "Wanda"}, {"layers": lambda name: True}):
        with pytest.raises(snows.UsageError, match="the masks are given"):
            snows.prune(tiny, images, chosen, **extra)
    with pytest.raises(snows.UsageError, match="chosen already"):
        snows.choose_masks(tiny, None, chosen)


def test_masks_of_a_selection_ask_for_no_images_once_more(tiny, images):
    chosen = snows.choose_masks(tiny, images, snows.NM(1, 2), mask_alg="Wanda")
    pruned = snows.prune(tiny, None, chosen, algo="MP")
    assert all(torch.equal(mask, chosen.masks[name]) for name, mask in pruned.masks.items())
    assert pruned.seconds > chosen.seconds > 0  # what choosing took is a part of it


def test_seconds_count_from_the_call(tiny, images):
    def slow():
        time.sleep(0.3)
        yield images

    assert snows.prune(tiny, slow(), snows.NM(1, 2), fast(schedule=0, joint_steps=0)).seconds > 0.3


def test_a_network_is_what_a_model_must_be():
    with pytest.raises(snows.UsageError, match="cannot use device"):
        snows.Network(torch.nn.Linear(2, 2), "nonsense")
    with pytest.raises(snows.UsageError, match=r"must be a torch.nn.Module"):
        snows.Network(3)
    with pytest.raises(snows.TraceError, match="DataParallel"):
        snows.Network(torch.nn.DataParallel(torch.nn.Linear(2, 2)))


def test_what_a_layer_without_memory_held_is_given_back_at_once(tiny, images):
    """Not when Python next looks for cycles: the layers after it need the room."""
    held, alive = [], []

    def hungry(layer, mask, streams, options):
        alive.append([reference() is not None for reference in held])
        graph = torch.ones(3)
        held.append(weakref.ref(graph))
        if layer.name == "grouped":
            raise torch.OutOfMemoryError
        return Update(streams.network.masked(layer, mask))

    gc.collect()
    gc.disable()
    try:
        pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(schedule=0), algo=Method(hungry))
    finally:
        gc.enable()
    assert "out of memory" in pruned.problems["grouped"]
    assert not any(itertools.chain(*alive))


def halve(layer, mask, streams, options):
    return Update(streams.network.masked(layer, mask) / 2)


def test_a_method_of_ones_own_sets_the_layers_and_its_options(tiny, images, monkeypatch):
    mine = Method(halve, fixed=dict(sweeps=2, schedule=0))
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(sweeps=1), algo=mine)
    for name, mask in pruned.masks.items():
        expected = tiny.get_parameter(f"{name}.weight") * mask / 4  # in two sweeps, without joint steps
        assert torch.equal(pruned.model.get_parameter(f"{name}.weight"), expected)
    monkeypatch.setitem(METHODS, "halve", mine)
    assert_same(snows.prune(tiny, images, snows.NM(1, 2), fast(), algo="halve"), pruned)
    with pytest.raises(snows.UsageError, match="is not one of SNOWS, MP, MP\\+, SparseGPT, halve"):
        snows.prune(tiny, images, snows.NM(1, 2), fast(), algo="third")


@pytest.mark.parametrize("method", [*METHODS.values(), Method(), replace(METHODS["SNOWS"], update_jointly=None)])
def test_a_method_s_options_have_joint_steps_only_if_it_takes_them(method):
    for options in (snows.Options(), snows.Options(joint_steps=0)):
        settled = method.settle(options)
        assert settled.joint_steps == (options.joint_steps if method.update_jointly else 0)
        assert method.settle(settled) == settled
        assert all(getattr(settled, name) == value for name, value in method.fixed.items())


def test_a_method_can_do_without_joint_steps(tiny, images):
    alone = replace(METHODS["SNOWS"], update_jointly=None)
    ours = snows.prune(tiny, images, snows.NM(1, 2), fast(), algo=alone)
    assert_same(ours, snows.prune(tiny, images, snows.NM(1, 2), fast(joint_steps=0)))
    assert not any(record.joint for record in ours.layers)
