"""Which CNNs the scripts know by name: their weights, normalisation, stated accuracy and data."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import timm
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a plain checkout works from any folder, without installation

from resnet_cifar import ResNet  # noqa: E402

from snows.classifier import (  # noqa: E402
    Classifier,
    cifar_transform,
    from_library,
    load_checkpoint,
    with_statistics,
)
from snows.data import Data, load, normalised  # noqa: E402
from snows.errors import SnowsError, UsageError  # noqa: E402

DIGITS_CHECKPOINT = ROOT / "checkpoints" / "resnet20_digits.safetensors"
DIGITS_ACCURACY = 98.32  # percent, as checkpoints/train_digits.py prints

# (release file, accuracy in percent on the official test set, as its authors state it)
HUB = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
HUB_WEIGHTS = {
    "resnet20_cifar10": ("cifar10_resnet20-4118986f.pt", 92.60),
    "resnet32_cifar10": ("cifar10_resnet32-ef93fc4d.pt", 93.53),
    "resnet44_cifar10": ("cifar10_resnet44-2a3cabcb.pt", 94.01),
    "resnet56_cifar10": ("cifar10_resnet56-187c023a.pt", 94.37),
    "resnet20_cifar100": ("cifar100_resnet20-23dac2f1.pt", 68.83),
    "resnet32_cifar100": ("cifar100_resnet32-84213ce6.pt", 70.16),
    "resnet44_cifar100": ("cifar100_resnet44-ffe32858.pt", 71.63),
    "resnet56_cifar100": ("cifar100_resnet56-f2eff4c8.pt", 72.63),
}
HUGGING_FACE_WEIGHTS = {  # model id on the hub; the accuracy is on its card
    "resnet50_cifar10": "edadaltocg/resnet50_cifar10",
    "resnet50_cifar100": "edadaltocg/resnet50_cifar100",
}


def load_classifier(args: argparse.Namespace) -> Classifier:
    """The network that --arch names, with its weights (--checkpoint, downloaded, or none) and its transform."""
    known = args.arch == "resnet20_digits" or args.arch in {**HUB_WEIGHTS, **HUGGING_FACE_WEIGHTS}
    pretrained = not (args.checkpoint or args.random_weights)
    torch.manual_seed(args.seed[0])  # of random weights
    build = small_network if known else from_library
    classifier = build(args.arch, pretrained) if known else build(args.arch, pretrained, args.num_classes)
    if args.checkpoint:
        load_checkpoint(classifier.model, args.checkpoint)
        classifier.stated_accuracy = None
    classifier.transform = with_statistics(classifier.transform, args.mean, args.std)
    return classifier


def small_network(arch: str, pretrained: bool) -> Classifier:
    """The digits network and the CIFAR networks, by the names above."""
    if arch == "resnet20_digits":
        classifier = Classifier(ResNet(20, 10, channels=1), normalised((0.5,), (0.5,)))
        if pretrained:
            load_checkpoint(classifier.model, DIGITS_CHECKPOINT)
            classifier.stated_accuracy = DIGITS_ACCURACY
        return classifier
    depth, classes = (int(number) for number in re.fullmatch(r"resnet(\d+)_cifar(\d+)", arch).groups())
    transform = cifar_transform(classes)
    if depth == 50:
        return Classifier(cifar_resnet50(arch, classes, pretrained), transform)
    model, (file, stated) = ResNet(depth, classes), HUB_WEIGHTS[arch]
    if pretrained:
        model.load_state_dict(fetch(arch, lambda: torch.hub.load_state_dict_from_url(HUB + file, check_hash=True)))
    return Classifier(model, transform, stated if pretrained else None)


def cifar_resnet50(arch: str, classes: int, pretrained: bool) -> nn.Module:
    """timm's ResNet-50 with a stem for 32 x 32 images: a 3 x 3 convolution of stride 1 and no pooling."""
    model = timm.create_model("resnet50", num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if pretrained:
        name = HUGGING_FACE_WEIGHTS[arch]
        model.load_state_dict(fetch(arch, lambda: timm.models.load_state_dict_from_hf(name, weights_only=True)))
    return model


def fetch(arch: str, download):
    """A downloaded state dict, or one clear line."""
    try:
        return download()
    except Exception as error:  # every hub and protocol raises its own
        raise SnowsError(
            f"cannot download the weights of {arch}: {error}. Give them with --checkpoint FILE instead."
        ) from error


def load_data(args: argparse.Namespace, classifier: Classifier) -> Data:
    """The images of --dset, by default those that --arch was trained on."""
    if args.dset is None:
        dataset = args.arch.rpartition("_")[2]
        args.dset = dataset if dataset in ("digits", "cifar10", "cifar100") else "imagenet"
    if args.dset == "digits" and args.arch != "resnet20_digits":
        raise UsageError("the digits are 8 x 8 grey images, which only resnet20_digits takes.")
    return load(args.dset, classifier.transform, args.data_dir, args.num_workers)
