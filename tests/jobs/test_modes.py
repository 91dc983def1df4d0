"""torch's modes that the caller may be in: the same bits as outside them."""

import contextlib

import pytest
import torch
from helpers import TinyCNN, randomise

import snows


@contextlib.contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default dtype": default_dtype,
    "a default device": lambda: torch.device("meta"),
}


def made():
    model = randomise(TinyCNN()).float()
    return model, torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mask_alg", ["MP", "SparseGPT", "ALPS", "OBS"])
@pytest.mark.parametrize("mode", MODES)
def test_a_job_does_not_depend_on_the_callers_modes(mode, mask_alg):
    options = snows.Options(batch_size=2, schedule=0, joint_steps=1)
    expected = snows.prune(*made(), snows.Unstructured(0.5), options, mask_alg=mask_alg)
    inside = MODES[mode]() if mode == "inference mode" else contextlib.nullcontext()
    with inside:
        model, images = made()  # tensors made in inference mode stay what they are
    with MODES[mode]():
        pruned = snows.prune(model, images, snows.Unstructured(0.5), options, mask_alg=mask_alg)
    assert pruned.layers[-1].loss_after < pruned.layers[-1].loss_before
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(pruned.model.state_dict()[name], tensor)


def test_the_callers_modes_are_as_they_were(tiny, images):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        snows.prune(tiny, images, snows.NM(1, 2), algo="MP+")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        snows.prune(tiny, images, snows.NM(1, 2), algo="MP+")
        assert not torch.is_grad_enabled()
