"""torch's default device and type belong to the caller: they change nothing that the library draws or holds."""

import pytest
import torch
from helpers import TinyCNN, randomise

import snows
from snows.calibration.mixtures import with_mixtures
from snows.masks.order import Reading, best_order


@pytest.fixture(params=["meta", "float64"])
def default(request):
    """Another default device, on which nothing can be computed, or another type; set only within."""

    def within(work):
        if request.param == "meta":
            with torch.device("meta"):
                return work()
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            return work()
        finally:
            torch.set_default_dtype(before)

    return within


def test_mixtures_are_the_same(default):
    images = torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = with_mixtures(images, 1, 0, "")
    torch.testing.assert_close(default(lambda: with_mixtures(images, 1, 0, "")), expected, rtol=0, atol=0)


def test_the_order_of_channels_is_the_same(default):
    readings = [Reading(torch.rand(64, 5, generator=torch.Generator().manual_seed(0)), 2, 4)]
    expected, *_ = best_order(readings)
    found, *_ = default(lambda: best_order(readings))
    assert torch.equal(found, expected)


def test_a_job_comes_to_the_same(default):
    model, images = randomise(TinyCNN()).float(), torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    options = snows.Options(schedule=1, joint_steps=1, mixtures=1, max_CG_iterations=2, joint_CG_iterations=2)
    expected = snows.prune(model, images, snows.NM(1, 2), options)
    found = default(lambda: snows.prune(model, images, snows.NM(1, 2), options))
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=0, atol=0)
