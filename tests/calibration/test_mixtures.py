"""Mixtures of two images: what they are made of, and what a job makes of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import snows
from snows.calibration.mixtures import LEAST_SHARE, with_mixtures


def distinct(count: int) -> torch.Tensor:
    """Images of which each is a unit vector, so that a mixture says what it is made of."""
    return torch.eye(count).view(count, count, 1, 1)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 150), copies=st.integers(1, 4), seed=st.integers(0, 9))
def test_each_image_has_its_mixtures_behind_it_with_one_other(count, copies, seed):
    images, each = distinct(count), 1 + copies
    mixed = with_mixtures(images, copies, seed).flatten(1)
    assert len(mixed) == each * count
    assert mixed[::each].equal(images.flatten(1))
    for place, shares in enumerate(mixed):
        own, others = place // each, shares.nonzero().flatten().tolist()
        assert shares.sum().item() == pytest.approx(1)
        assert own in others
        if place % each and count > 1:
            assert len(others) == 2
            assert min(shares[others]) >= LEAST_SHARE - 1e-6
    for copy in range(1, each) if count > 1 else ():
        assert mixed[copy::each].gt(0).sum(0).eq(2).all()  # each image is the other one of one mixture


def test_the_seed_decides_the_mixtures():
    images = torch.randn(12, 1, 2, 2)
    first, again, other = (with_mixtures(images, 1, seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_a_job_with_mixtures_is_one_on_the_images_and_their_mixtures(tiny, images):
    options = snows.Options(k_step=1, joint_steps=1, min_samples=0, seed=3)
    found = snows.prune(tiny, images, snows.NM(2, 4), options.but(mixtures=1), mask_alg="ALPS")
    mixed = with_mixtures(images, 1, 3)
    wanted = snows.prune(tiny, mixed, snows.NM(2, 4), options, mask_alg="ALPS")
    assert all(found.masks[name].equal(wanted.masks[name]) for name in wanted.masks)
    for name, weight in wanted.model.state_dict().items():
        assert found.model.state_dict()[name].equal(weight), name


@pytest.mark.parametrize(("min_samples", "solved"), [(2, True), (3, False)])  # 5 images x 3 outputs, 6 weights: 2.5
@pytest.mark.parametrize("mixtures", [0, 1, 3])
def test_mixtures_are_no_images_for_layers_that_want_many(tiny, images, mixtures, min_samples, solved):
    """A head that the images alone are too few for is left unsolved with mixtures too."""
    options = snows.Options(k_step=0, joint_steps=0, schedule=0, min_samples=min_samples, mixtures=mixtures)
    pruned = snows.prune(tiny, images, snows.NM(2, 4), options, layers=lambda name: name == "fc")
    mask = pruned.masks["fc"]
    assert mask.sum() == 6
    assert pruned.model.fc.weight[mask].equal(tiny.fc.weight[mask]) is not solved


def test_a_job_says_that_mixtures_are_among_its_images(tiny, images, caplog):
    with caplog.at_level("INFO", "snows"):
        snows.prune(tiny, images, snows.NM(2, 4), snows.Options(k_step=1, schedule=0, joint_steps=0, mixtures=2))
    assert "15 images, mixtures among them, take up to" in caplog.text
