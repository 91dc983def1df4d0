"""Train the ResNet-20 that ships as resnet20_digits.safetensors: scikit-learn's digits, seeded, under two minutes.

python checkpoints/train_digits.py [--out FILE]
"""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning")]

from resnet_cifar import ResNet  # noqa: E402

from snows.data import digits, normalised  # noqa: E402
from snows.evaluate import accuracy  # noqa: E402


def shifted(images: torch.Tensor) -> torch.Tensor:
    """A copy of (n, c, h, w), each image moved by up to one pixel in each direction."""
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    n, _, height, width = images.shape
    offsets = torch.randint(0, 3, (n, 2)).tolist()
    return torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(offsets)])


def train(epochs: int = 60, seed: int = 0) -> tuple[torch.nn.Module, float]:
    """(the trained network, its accuracy in percent on the test digits)."""
    torch.manual_seed(seed)
    train_set, test_set = digits(normalised((0.5,), (0.5,)))
    loader = DataLoader(train_set, batch_size=100, shuffle=True)
    model = ResNet(20, 10, channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(shifted(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), accuracy(model, DataLoader(test_set, batch_size=256))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("resnet20_digits.safetensors"))
    args = parser.parse_args()
    model, percent = train()
    safetensors.torch.save_file(model.state_dict(), args.out)
    print(f"{args.out}: {percent:.2f} % of the test digits")
