"""The networks that several benches prune, and the images of CIFAR-10."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ROOT
from resnet_cifar import ResNet
from torch import Tensor, nn
from torch.utils.data import Subset
from vit_small import vit_cifar10

import snows
from snows.errors import UsageError
from snows.masks.patterns import Pattern
from snows.zoo import images as data
from snows.zoo.classifiers import load_checkpoint
from snows.zoo.evaluate import accuracy

NETWORKS = {"resnet20_cifar10": lambda: ResNet(20, 10), "vit_cifar10": vit_cifar10}
HALF = (0.5,) * 3  # the mean and the deviation of the channels that both were trained with
BLACK = -1.0  # of images that are normalised so
DRAWN, SEEDS, HELD_OUT = 3000, 10, 1000  # most images of a calibration, its seeds, images that are held out from all
PATTERNS = {f"unstructured {share}": snows.Unstructured(share) for share in (0.5, 0.6, 0.7, 0.8, 0.9)}
PATTERNS |= {"2:4": snows.NM(2, 4), "1:4": snows.NM(1, 4), "4:8": snows.NM(4, 8)}


def weights(network: str, given: Path | None = None) -> Path:
    """The file of a network's weights: the one that is given, or the one that ships.

    Raises:
        UsageError: neither.
    """
    ships = ROOT / "checkpoints" / f"{network}.safetensors"
    if given is None and not ships.exists():
        raise UsageError(f"--checkpoint is required for {network}: its weights do not ship.")
    return given or ships


def trained(network: str, checkpoint: Path) -> nn.Module:
    """A network with its weights, in evaluation mode: training mode would change its BatchNorm statistics."""
    model = NETWORKS[network]()
    load_checkpoint(model, checkpoint)
    return model.eval()


def fill_zero_weights(model: nn.Module) -> nn.Module:
    """A network of random weights, its zero ones too, as torchvision's heads begin: they would hide all else."""
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    return model


def cifar10(file: Path) -> data.Data:
    """Calibration and test images of an .npz, normalised as the networks expect."""
    return data.Data(*data.npz(file, data.normalised(HALF, HALF)))


def views(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image of a batch mirrored or not, and cut out at random of itself with a black border, as in training."""
    count, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4, value=BLACK)  # (count, channels, height + 8, width + 8)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = (top + torch.arange(height))[:, None, :, None], (left + torch.arange(width))[:, None, None]
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    cut = padded[image, channel, rows, columns]
    mirrored = torch.rand(count, generator=generator) < 0.5
    return cut.flip(-1).where(mirrored[:, None, None, None], cut)


def held_out(images: data.Data, count: int = HELD_OUT) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of training images, always the same, that no calibration of DRAWN images or fewer by SEEDS seeds draws.

    Raises:
        UsageError: those draw all the images.
    """
    total, free = len(images.train), torch.ones(len(images.train), dtype=torch.bool)
    for seed in range(SEEDS):
        free[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:DRAWN]] = False
    (left,) = free.nonzero(as_tuple=True)
    if not len(left):
        raise UsageError(f"{total} training images are too few to hold some out from calibrations of {DRAWN}.")
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(0))
    return images.batches(Subset(images.train, left[order[:count]].tolist()), 128)


def with_counts(model: nn.Module, pattern: Pattern, layers: Callable[[str], bool]) -> Pattern:
    """The pattern, every layer's share in which is the one that magnitudes choose; N:M as it is."""
    if isinstance(pattern, snows.NM):
        return pattern
    masks = snows.choose_masks(model, None, pattern, layers=layers).masks
    return replace(pattern, layer_sparsity={name: 1 - mask.float().mean().item() for name, mask in masks.items()})


class Bench:
    """The dense network and its images; accuracies that several rows share are measured once."""

    def __init__(self, network: str, checkpoint: Path, dset: Path, device: str):
        self.model, self.device = trained(network, checkpoint), device
        vit = network == "vit_cifar10"
        self.layers = (lambda name: name.startswith("blocks.")) if vit else (lambda name: True)
        self.data = cifar10(dset)
        self.test = list(self.data.test_batches(128))
        self.dense_accuracy = accuracy(self.model, self.test, device)
        self.masked_accuracies = {}

    def masked_accuracy(self, pattern: str) -> float:
        """What magnitude masks alone leave."""
        if pattern not in self.masked_accuracies:
            masked = snows.prune(self.model, None, PATTERNS[pattern], algo="MP", layers=self.layers, device=self.device)
            self.masked_accuracies[pattern] = accuracy(masked.model, self.test, self.device)
        return self.masked_accuracies[pattern]
