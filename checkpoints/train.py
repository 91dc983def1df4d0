"""Train the networks that ship with SNOWS, seeded; a run that was stopped goes on from its last epoch.

    python checkpoints/train.py resnet20_digits
    python checkpoints/train.py vit_digits
    python checkpoints/train.py vit_cifar10 --dset cifar10.npz

Writes checkpoints/NETWORK.safetensors and, beside it until the last epoch is done, NETWORK.training.pt.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning"), str(ROOT / "VIT_pruning")]

from resnet_cifar import ResNet
from vit_small import vit_cifar10, vit_digits

from snows.cli.shell import shell
from snows.zoo.evaluate import accuracy
from snows.zoo.images import load, normalised


@dataclass
class Recipe:
    """What one network is trained with: one cycle of the learning rate over `epochs`, mirrored and shifted images."""

    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    dset: str
    epochs: int
    pixels: int  # largest shift in each direction
    mirror: bool = False
    smoothing: float = 0.0  # of the labels
    batch_size: int = 100


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(timm.optim.param_groups_weight_decay(model, 0.05), lr=2e-3)


RECIPES = {
    "resnet20_digits": Recipe(lambda: ResNet(20, 10, channels=1), sgd, "digits", epochs=60, pixels=1),
    "vit_digits": Recipe(vit_digits, adamw, "digits", epochs=200, pixels=1),
    "vit_cifar10": Recipe(vit_cifar10, adamw, "cifar10", epochs=18, pixels=3, mirror=True, smoothing=0.1),
}


def augmented(images: Tensor, pixels: int, mirror: bool) -> Tensor:
    """A copy of (n, c, h, w), each image moved by up to `pixels` in each direction and half of them mirrored."""
    padded = F.pad(images, (pixels,) * 4, value=-1.0)
    n, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pixels + 1, (n, 2)).tolist()
    moved = torch.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(offsets)])
    if mirror:
        moved = torch.where(torch.rand(n, 1, 1, 1) < 0.5, moved.flip(-1), moved)
    return moved


def train(recipe: Recipe, dset: str, data_dir: Path, progress: Path, seed: int = 0) -> tuple[nn.Module, float]:
    """(the trained network, its accuracy in percent on the test images); `progress` holds each epoch's state."""
    torch.manual_seed(seed)
    channels = 1 if recipe.dset == "digits" else 3
    data = load(dset, normalised((0.5,) * channels, (0.5,) * channels), data_dir)
    loader = DataLoader(data.train, batch_size=recipe.batch_size, shuffle=True)
    model = recipe.build()
    optimizer = recipe.optimizer(model)
    highest = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=recipe.epochs * len(loader))
    parts, done = (model, optimizer, schedule), 0
    if progress.exists():
        *states, random, done = torch.load(progress, weights_only=True)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        torch.set_rng_state(random)
    for epoch in range(done, recipe.epochs):
        model.train()
        for images, labels in loader:
            logits = model(augmented(images, recipe.pixels, recipe.mirror))
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {recipe.epochs}: last batch's loss {loss.item():.3f}", flush=True)
        partial = progress.with_suffix(".partial")
        torch.save([*(part.state_dict() for part in parts), torch.get_rng_state(), epoch + 1], partial)
        os.replace(partial, progress)
    return model.eval(), accuracy(model, DataLoader(data.test, batch_size=256))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=RECIPES)
    parser.add_argument("--dset", help="the images (default: what the network's name says); see unstr.py --help")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    parser.add_argument("--out", type=Path, help="default: NETWORK.safetensors beside this script")
    args = parser.parse_args()
    recipe = RECIPES[args.network]
    out = args.out or Path(__file__).with_name(f"{args.network}.safetensors")
    progress = out.with_suffix(".training.pt")
    model, percent = train(recipe, args.dset or recipe.dset, args.data_dir, progress)
    safetensors.torch.save_file(model.state_dict(), out)
    progress.unlink()
    print(f"{out}: {percent:.2f} % of the test images")


if __name__ == "__main__":
    shell(main)
