"""Trained classifiers by name: those of libraries with their own transforms, and local checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torchvision
from torch import nn
from torchvision.transforms import v2

from snows.errors import SnowsError, UsageError, first_line, listed
from snows.zoo import hugging_face
from snows.zoo.checkpoints import State, fitted, read_state
from snows.zoo.images import normalised

SOURCES = ("hf-hub:", "local-dir:")  # of timm's networks besides its own, as it spells them


@dataclass
class Classifier:
    """A network, the transform that its images need, and the accuracy that its weights are stated to have."""

    model: nn.Module
    transform: Callable
    stated_accuracy: float | None = None  # percent, top-1
    in_order: bool = False  # files fit too that hold the weights by other names, in the model's order
    pixels: int | None = None  # a side of the images that it was trained on, where its transform does not resize

    def adapted(self, mean: Sequence[float] | None, std: Sequence[float] | None, resize: int | None) -> Classifier:
        """The classifier for images of another normalisation or size; see with_statistics and with_resize."""
        return replace(self, transform=with_resize(with_statistics(self.transform, mean, std), resize))


def from_library(arch: str, pretrained: bool, num_classes: int | None = None, others: Iterable[str] = ()) -> Classifier:
    """Any classifier of torchvision, timm or transformers; "timm/NAME" or "torchvision/NAME" where both know the name.

    "hf-hub:OWNER/NAME" is one of timm's on the Hugging Face hub, "local-dir:FOLDER" one in a folder; so are
    "transformers:OWNER/NAME" and "transformers:FOLDER" of the package transformers. A bare name is torchvision's if
    torchvision has it. pretrained: the weights are downloaded (torchvision: IMAGENET1K_V1 where there is one) with a
    progress bar; otherwise they are random. others: the names that would have been taken besides.

    Raises:
        UsageError: no library knows the name, there is no such folder, or its weights are those of no classifier.
        SnowsError: the weights cannot be downloaded.
    """
    library, _, name = arch.rpartition("/")
    folder = arch.removeprefix("local-dir:")
    if folder != arch and not Path(folder).is_dir():
        raise UsageError(f"{arch}: there is no folder {folder}.")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    place = arch.removeprefix(hugging_face.PREFIX)
    if place != arch:
        hugging_face.check_place(place)
    try:
        if place != arch:
            model = hugging_face.network_of(place, pretrained, num_classes)
            return Classifier(model, hugging_face.transform_of(place))
        if library in ("", "torchvision") and name in torchvision.models.list_models(torchvision.models):
            kinds = torchvision.models.get_model_weights(name)
            weights = getattr(kinds, "IMAGENET1K_V1", kinds.DEFAULT)  # the largest networks have others alone
            model = torchvision.models.get_model(name, weights=weights if pretrained else None, **classes)
            stated = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] if pretrained else None
            return Classifier(model, weights.transforms(), stated)
        elsewhere = arch.startswith(SOURCES)
        if elsewhere or (library in ("", "timm") and timm.is_model(name)):
            model = timm.create_model(arch if elsewhere else name, pretrained=pretrained, **classes)
            config = timm.data.resolve_model_data_config(model)
            return Classifier(model, timm.data.create_transform(**config, is_training=False))
    except UsageError:
        raise
    except Exception as error:  # each library, hub and protocol raises its own
        advice = " Give a file of its weights as `checkpoint`." if pretrained else ""
        advice = f" Give a folder that has its files ({hugging_face.PREFIX}FOLDER)." if place != arch else advice
        said = f"cannot get {arch}: {type(error).__name__}: {first_line(error)}"
        raise SnowsError(f"{said.rstrip('.')}.{advice}" if advice else said) from error
    known = f"; this script knows {listed(others)}" if others else ""
    raise UsageError(
        f"unknown architecture '{arch}': neither torchvision nor timm has it (see timm.list_models()){known}. On the "
        f"Hugging Face hub, timm's are hf-hub:OWNER/NAME, and those of transformers transformers:OWNER/NAME."
    )


def with_statistics(transform: Callable, mean: Sequence[float] | None, std: Sequence[float] | None) -> Callable:
    """A transform with another normalisation, one number per channel.

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


def with_resize(transform: Callable, size: int | None) -> Callable:
    """A transform of images whose shorter side is scaled to `size` and whose middle is cut out before it."""
    return transform if size is None else v2.Compose([v2.Resize(size), v2.CenterCrop(size), transform])


def is_normalisation(transform: Callable) -> bool:
    return isinstance(transform, (v2.Normalize, torchvision.transforms.Normalize))


def load_checkpoint(model: nn.Module, path: Path, key: str | None = None, in_order: bool = False) -> None:
    """Load local weights into `model`, strictly: every name and shape must fit.

    Takes .safetensors, or what torch.save wrote (.pt, .pth, .bin, ...), told apart by what is in it; no code of a
    pickle runs. The weights may lie bare or under one of the usual keys, with or without a common prefix. key: which
    entry to take, where the file has several. in_order: where none of the names is the model's, tensors whose kinds
    and shapes stand in its order are taken for its own.

    Raises:
        UsageError: the file is missing, damaged, or does not fit; the message lists what does not, or is no number.
    """
    state, own = read_state(path, key), model.state_dict()
    if in_order and state.keys().isdisjoint(own) and kinds(state) == kinds(own):
        state = dict(zip(own, state.values()))
    state = fitted(state, own, path)
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"{path} holds NaN or infinity in {listed(broken)}.")
    model.load_state_dict(state, strict=True)


def kinds(state: State) -> list[tuple[str, tuple[int, ...]]]:
    """What stands in a state dict, in its order: the last part of each name, and the shape."""
    return [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in state.items()]


def cifar_transform(classes: int) -> Callable:
    """The transform of CIFAR-10 or CIFAR-100 images with the statistics of its training set."""
    if classes == 10:
        return normalised((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    return normalised((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))
