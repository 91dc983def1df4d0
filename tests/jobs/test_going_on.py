"""Jobs that go on with what an earlier call finished, in other micro-batches than that had."""

import pytest
import torch
from helpers import TinyCNN, randomise

import snows
from snows.masks.saliency import SALIENCIES

SETTINGS = dict(schedule=1, joint_steps=1, max_CG_iterations=2, joint_CG_iterations=2, min_samples=0.0)


@pytest.mark.parametrize("mask_alg", SALIENCIES)
@pytest.mark.parametrize("finished", [1, 3])
def test_masks_that_images_chose_are_taken_over(mask_alg, finished):
    images = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    job, steps, replayed = (randomise(TinyCNN()).float(), images, snows.NM(1, 2)), [], []
    options = snows.Options(batch_size=16, **SETTINGS)
    whole = snows.prune(*job, options, mask_alg=mask_alg, listener=lambda step, job: steps.append(step))
    hooks = {"finished": steps[:finished], "listener": lambda step, job: replayed.append(step)}
    other = snows.prune(*job, options.but(batch_size=3), mask_alg=mask_alg, **hooks)
    for before, after in zip(steps[:finished], replayed):
        assert after.replayed
        assert torch.equal(before.mask, after.mask)
    assert len(other.layers) == len(whole.layers)
    assert other.sparsity == whole.sparsity


@pytest.mark.parametrize("ended", ["within the joint steps", "behind them"])
def test_joint_steps_that_ended_in_part_are_one_solution_all_the_same(ended):
    """In other micro-batches the solution is another one, of which no part may stand beside a part of the first."""
    images = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    job, steps, after = (randomise(TinyCNN()).float(), images, snows.NM(1, 2)), [], []
    options = snows.Options(batch_size=16, **{**SETTINGS, "schedule": 0})
    whole = snows.prune(*job, options, listener=lambda step, job: steps.append(step))
    layers = len(whole.masks)
    assert [step.record.joint for step in steps] == [False] * layers + [True] * layers
    count = layers + (2 if ended == "within the joint steps" else layers)
    hooks = {"finished": steps[:count], "listener": lambda step, job: after.append(step)}
    gone_on = snows.prune(*job, options.but(batch_size=4), **hooks)
    assert [step.replayed for step in after] == [True] * layers + [ended == "behind them"] * layers
    expected = steps[layers:] if ended == "behind them" else after[layers:]
    for step in expected:
        assert torch.equal(gone_on.model.get_parameter(f"{step.record.name}.weight"), step.weight)
    if ended == "within the joint steps":
        assert not any(torch.equal(new.weight, old.weight) for new, old in zip(after[layers:], steps[layers:]))
