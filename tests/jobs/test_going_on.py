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
