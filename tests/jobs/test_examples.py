"""Models that cannot be traced with symbols alone are traced with the calibration images."""

import pytest
import torch
from helpers import randomise
from torch import nn

import snows


class Asserts(nn.Module):
    """Looks at its images' size, as hand-written vision transformers do."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(8, 4), nn.Linear(16, 3)

    def forward(self, x):
        b, c, h, w = x.shape
        assert h == w == 4
        rows = x.transpose(1, 2).reshape(b, h, c * w)
        return self.head(torch.tanh(self.map(rows)).flatten(1))


class Batches:
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images.split(2))


@pytest.mark.parametrize("kind", ["tensor", "loader"])
def test_an_assertion_on_the_images_size_is_met_by_the_calibration_images(images, kind):
    model = randomise(Asserts())
    calibration = images if kind == "tensor" else Batches(images)
    options = snows.Options(batch_size=5, schedule=0)
    chosen = snows.choose_masks(model, calibration, snows.NM(1, 2))
    pruned = snows.prune(model, calibration, snows.NM(1, 2), options)
    assert set(pruned.masks) == set(chosen.masks) == {"map", "head"}
    assert all(record.loss_after < record.loss_before for record in pruned.layers if record.name == "head")


def test_without_images_the_obstacle_is_named():
    with pytest.raises(snows.TraceError, match=r"cannot trace .* Or give images"):
        snows.choose_masks(randomise(Asserts()), None, snows.NM(1, 2))
