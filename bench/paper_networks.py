"""The networks of the paper's tables and its field's, and what is at hand of their weights and images."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import common  # noqa: F401  (it says where the project lies)
import numpy as np
from torch import Tensor, nn
from torch.utils.data import Subset
from utils import KNOWN

from snows.checksum import checksum
from snows.errors import SnowsError
from snows.zoo.arrays import Arrays
from snows.zoo.classifiers import Classifier, with_statistics
from snows.zoo.evaluate import Score, score
from snows.zoo.images import Data
from snows.zoo.registry import load_classifier, load_data

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
SIDE = 64  # pixels of random images, which a network's transform scales to its own


@dataclass(frozen=True)
class Entry:
    """A network of the grid.

    arch: as --arch of the scripts. images: how many calibrate. k_step: K of the preset `paper`, as in the README's
        commands; of networks that those do not name, as of the nearest that they do.
    layers: patterns of those to prune; `dense`: of those among them that stay dense, as all depthwise convolutions do.
    statistics: (mean, std) that a file in --weights_dir was trained with, where the usual download has others.
    """

    title: str
    arch: str
    dataset: str
    images: int
    k_step: int
    layers: tuple[str, ...] = ("*",)
    dense: tuple[str, ...] = ()
    statistics: tuple | None = None

    def prunes(self, model: nn.Module) -> Callable[[str], bool]:
        """Which layers of the model are pruned, by name."""
        modules = dict(model.named_modules())

        def chosen(name: str) -> bool:
            groups = getattr(modules.get(name), "groups", 1)
            kept = any(fnmatchcase(name, pattern) for pattern in self.dense)
            return groups == 1 and not kept and any(fnmatchcase(name, pattern) for pattern in self.layers)

        return chosen


BLOCKS = ("encoder.layers.*", "blocks.*", "stages.*")
HALF = (0.5,) * 3
NETWORKS = {
    "resnet20_cifar10": Entry("ResNet-20, CIFAR-10", "resnet20_cifar10", "cifar10", 3000, 20, statistics=(HALF, HALF)),
    "resnet50_cifar100": Entry("ResNet-50, CIFAR-100", "resnet50_cifar100", "cifar100", 3000, 30),
    "resnet50": Entry("ResNet-50, ImageNet", "resnet50", "imagenet", 3000, 30),
    "mobilenet_v2": Entry("MobileNetV2, ImageNet", "mobilenet_v2", "imagenet", 3000, 30, dense=("features.0.*",)),
    "efficientnet_lite0": Entry(
        "EfficientNet-Lite0, ImageNet", "efficientnet_lite0", "imagenet", 3000, 30, dense=("conv_stem",)
    ),
    "vit_b_16": Entry("ViT-B/16, ImageNet", "vit_b_16", "imagenet", 256, 3, BLOCKS),
    "vit_l_16": Entry("ViT-L/16, ImageNet", "vit_l_16", "imagenet", 256, 3, BLOCKS),
    "deit_s": Entry("DeiT-S, ImageNet", "timm/deit_small_patch16_224", "imagenet", 256, 3, BLOCKS),
    "convnext_t": Entry("ConvNeXt-T, ImageNet", "timm/convnext_tiny", "imagenet", 256, 3, BLOCKS),
}


class Subject:
    """A network with its weights, its images, and what the dense network says of those that test.

    Raises:
        SnowsError: its weights or images are not at hand; the message says what to do.
    """

    def __init__(self, name: str, args: Namespace, device: str):
        self.entry, self.device = NETWORKS[name], device
        classifier = classifier_of(name, self.entry, args)
        self.model = classifier.model.eval()
        self.data = random_data(classifier) if args.random_weights else data_of(self.entry, classifier, args)
        if args.test_images and args.test_images < len(self.data.test):
            every = len(self.data.test) // args.test_images
            self.data.test = Subset(self.data.test, range(0, len(self.data.test), every))
        self.checksum = checksum(self.model.state_dict().values())

    @cached_property
    def dense(self) -> tuple[Score, Tensor]:
        """(the dense network's score, its logits on the test images), measured once."""
        return score(self.model, self.test(), self.device)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.test_batches(128)


def weights_of(name: str, folder: Path | None) -> Path | None:
    """The file of a network's weights in --weights_dir, if there is one."""
    files = [folder / f"{name}{suffix}" for suffix in SUFFIXES] if folder else []
    return next((file for file in files if file.is_file()), None)


def classifier_of(name: str, entry: Entry, args: Namespace) -> Classifier:
    """The network with the weights in --weights_dir, else with those that it is known by, which are downloaded."""
    file = None if args.random_weights else weights_of(name, args.weights_dir)
    try:
        classifier = load_classifier(entry.arch, KNOWN, file, args.random_weights)
    except SnowsError as error:
        where = f"Put a file {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])}) into --weights_dir."
        raise SnowsError(f"weights: {str(error).rstrip('.')}. {where}") from error
    if file is not None and entry.statistics is not None:
        classifier.transform = with_statistics(classifier.transform, *entry.statistics)
    return classifier


def data_of(entry: Entry, classifier: Classifier, args: Namespace) -> Data:
    """The images: --data_dir/DATASET.npz or the folder --data_dir/DATASET, else as the scripts look in --data_dir."""
    places = [args.data_dir / f"{entry.dataset}.npz", args.data_dir / entry.dataset]
    found = next((str(place) for place in places if place.exists()), entry.dataset)
    try:
        return load_data(entry.arch, classifier, found, args.data_dir, args.num_workers)
    except SnowsError as error:
        where = f"Put {places[0].name}, or a folder {places[1].name} with train and val, into --data_dir."
        raise SnowsError(f"images: {str(error).rstrip('.')}. {where}") from error


def random_data(classifier: Classifier) -> Data:
    """Images of noise, with labels, for random weights."""
    side = classifier.pixels or SIDE
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8) for count in (64, 16)]
    return Data(*(Arrays(part, generator.integers(0, 10, len(part)), classifier.transform) for part in parts))
