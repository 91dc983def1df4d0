"""What the scripts' --arch and --dset mean: networks known by name, torchvision's and timm's, and their images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from snows.errors import SnowsError, UsageError, first_line
from snows.zoo.classifiers import Classifier, from_library, load_checkpoint, with_statistics
from snows.zoo.images import DATASETS, Data, load

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
Known = dict[str, Callable[[bool], Classifier]]  # name -> builder, told whether the weights are wanted


def shipped(build: Callable[[], nn.Module], transform: Callable, file: str, accuracy: float) -> Callable:
    """The builder of a network whose weights ship with the repository.

    accuracy: percent of its test images, as checkpoints/train.py prints.

    Raises (the builder): UsageError: an installed package has no weights beside it, and none were given.
    """

    def builder(pretrained: bool) -> Classifier:
        classifier = Classifier(build(), transform)
        if pretrained and not (CHECKPOINTS / file).exists():
            raise UsageError(
                f"{file} is not in {CHECKPOINTS}: it ships in the folder checkpoints/ of the repository, not in the "
                f"installed package. Run the scripts of a checkout, or give a file of weights as `checkpoint`."
            )
        if pretrained:
            load_checkpoint(classifier.model, CHECKPOINTS / file)
            classifier.stated_accuracy = accuracy
        return classifier

    return builder


def load_classifier(args: argparse.Namespace, known: Known) -> Classifier:
    """The network that --arch names, with its weights (--checkpoint, shipped, downloaded, or none) and its transform.

    Raises:
        UsageError: an unknown name, or a checkpoint that does not fit. SnowsError: a download that failed.
    """
    if args.checkpoint and args.random_weights:
        raise UsageError("--checkpoint and --random_weights exclude each other.")
    if args.num_classes is not None and args.arch in known:
        raise UsageError(f"--num_classes is for torchvision's and timm's networks: {args.arch} has its own.")
    pretrained = not (args.checkpoint or args.random_weights)
    torch.manual_seed(args.seed[0])  # of random weights
    if args.arch in known:
        classifier = known[args.arch](pretrained)
    else:
        classifier = from_library(args.arch, pretrained, args.num_classes)
    if args.checkpoint:
        load_checkpoint(classifier.model, args.checkpoint)
        classifier.stated_accuracy = None
    classifier.transform = with_statistics(classifier.transform, args.mean, args.std)
    return classifier


def fetch(arch: str, download: Callable[[], dict]) -> dict:
    """A downloaded state dict, or one clear line."""
    try:
        return download()
    except Exception as error:  # every hub and protocol raises its own
        raise SnowsError(
            f"cannot download the weights of {arch}: {error}. Give them with --checkpoint FILE instead."
        ) from error


def load_data(args: argparse.Namespace, classifier: Classifier) -> Data:
    """The images of --dset, by default those that the name of --arch ends in, else ImageNet."""
    if args.dset is None:
        dataset = args.arch.rpartition("_")[2]
        args.dset = dataset if dataset in DATASETS else "imagenet"
    if args.dset == "digits" and not args.arch.endswith("_digits"):
        raise UsageError("the digits are 8 x 8 grey images, which only the networks named ..._digits take.")
    data = load(args.dset, classifier.transform, args.data_dir, args.num_workers)
    check_fits(classifier.model, data, f"the images of {args.dset} do not fit {args.arch}")
    return data


@torch.no_grad()
def check_fits(model: nn.Module, data: Data, complaint: str) -> None:
    """Run one image through the network.

    Raises:
        UsageError: it cannot take it: another number of channels or pixels.
    """
    try:
        model.eval()(data.train[0][0][None])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(f"{complaint}: {first_line(error)}") from error
