import pytest
import torch
from torch import nn

import snows
from snows.deploy.deployable import Deployable


class Small(nn.Module):
    """A BatchNorm to be folded, groups, a matrix and a 1 x 1 convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        features = torch.relu(self.norm(self.stem(images)))
        features = torch.relu(self.narrow(torch.relu(self.grouped(features))))
        return self.fc(features.mean((2, 3)))


@pytest.fixture
def small_network():
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(16, 4, 6, 6))  # the BatchNorm's statistics
    return model.eval()


@pytest.fixture
def deployable(small_network):
    """That network at 2:4, with five test images in two batches."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 4, 6, 6, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    pruned = snows.prune(small_network, None, snows.NM(2, 4), algo="MP")
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    return Deployable(pruned.model, pruned.masks, lambda: batches, lambda: images, snows.NM(2, 4))
