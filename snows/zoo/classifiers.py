"""Trained classifiers by name: torchvision's and timm's with their own transforms, and local checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

from snows.errors import SnowsError, UsageError, first_line, listed
from snows.zoo.images import normalised

WRAPPERS = ("state_dict", "model_state_dict", "model", "masks")  # keys that files hold their tensors under
PREFIXES = ("module.", "_orig_mod.")  # that DataParallel and torch.compile put before every name


@dataclass
class Classifier:
    """A network, the transform that its images need, and the accuracy that its weights are stated to have."""

    model: nn.Module
    transform: Callable
    stated_accuracy: float | None = None  # percent, top-1


def from_library(arch: str, pretrained: bool, num_classes: int | None = None) -> Classifier:
    """Any torchvision or timm classifier; "timm/NAME" or "torchvision/NAME" where both know the name.

    A bare name is torchvision's if torchvision has it. pretrained: the weights are downloaded (torchvision:
    IMAGENET1K_V1) with a progress bar; otherwise they are random.

    Raises:
        UsageError: neither library knows the name. SnowsError: the weights cannot be downloaded.
    """
    library, _, name = arch.rpartition("/")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if library in ("", "torchvision") and name in torchvision.models.list_models(torchvision.models):
            weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
            model = torchvision.models.get_model(name, weights=weights if pretrained else None, **classes)
            stated = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] if pretrained else None
            return Classifier(model, weights.transforms(), stated)
        if library in ("", "timm") and timm.is_model(name):
            model = timm.create_model(name, pretrained=pretrained, **classes)
            config = timm.data.resolve_model_data_config(model)
            return Classifier(model, timm.data.create_transform(**config, is_training=False))
    except Exception as error:  # each library, hub and protocol raises its own
        raise SnowsError(f"cannot get {arch}: {type(error).__name__}: {first_line(error)}") from error
    raise UsageError(f"unknown architecture '{arch}': neither torchvision nor timm has it (see timm.list_models()).")


def with_statistics(transform: Callable, mean: Sequence[float] | None, std: Sequence[float] | None) -> Callable:
    """The same transform with another normalisation, one number per channel.

    Raises:
        UsageError: only one of the two, or a std that is not positive.
    """
    if mean is None and std is None:
        return transform
    if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
        raise UsageError("`mean` and `std` go together, one number per channel each, and a std is positive.")
    if isinstance(transform, v2.Compose) or hasattr(transform, "transforms"):
        kept = [t for t in transform.transforms if not is_normalisation(t)]
        return v2.Compose([*kept, v2.Normalize(mean, std)])
    vars(transform).update(mean=mean, std=std)  # torchvision's presets
    return transform


def is_normalisation(transform: Callable) -> bool:
    return isinstance(transform, (v2.Normalize, torchvision.transforms.Normalize))


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load local weights into `model`, strictly: every name and shape must fit.

    Takes .safetensors, or what torch.save wrote (.pt, .pth, .bin, ...; only tensors, no pickled code), bare or under
    one of the usual keys, with or without the prefixes of DataParallel and torch.compile.

    Raises:
        UsageError: the file is missing, damaged, or does not fit; the message lists what does not.
    """
    state = read_state(path)
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise UsageError(f"{path} does not fit the network: {listed(problems)}.")
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{path} holds NaN or infinity in {listed(broken)}.")
    model.load_state_dict(state, strict=True)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, without the prefixes and the dict around them that training scripts add."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes raise in either format has no end
        raise UsageError(f"{path} is damaged or no checkpoint of plain tensors: {first_line(error)}") from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(map(is_named_tensor, state.items())):
        found = f", but {listed(map(str, state))}" if isinstance(state, dict) and state else ""
        raise UsageError(f"{path} holds no state dict (names and dense tensors){found}.")
    for prefix in PREFIXES:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def is_named_tensor(entry: tuple) -> bool:
    """A name and a tensor with a number at every place: not sparse, nested, quantised, or without data."""
    name, tensor = entry
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def cifar_transform(classes: int) -> Callable:
    """The transform of CIFAR-10 or CIFAR-100 images with the statistics of its training set."""
    if classes == 10:
        return normalised((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    return normalised((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
