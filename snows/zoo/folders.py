"""Images in folders: which of them calibrate and which test, and which class each folder stands for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from snows.errors import UsageError, listed
from snows.zoo.arrays import NO_LABEL, halves
from snows.zoo.pictures import read_picture

log = logging.getLogger("snows")

HIDDEN = (".", "__MACOSX")  # how folders begin that programs leave behind
TRAIN = ("train", "training")  # what people call the part that calibrates, and
TEST = ("val", "valid", "validation", "test", "testing")  # the one that tests, the first of these that is there


@dataclass
class Part:
    """Image files and the class folder of each, "" for those in none; classes: all the class folders, sorted."""

    folder: Path
    paths: list[str]
    folders: list[str]
    classes: list[str]

    def of(self, indices: Sequence[int]) -> Part:
        """Some of the images."""
        paths, folders = [self.paths[i] for i in indices], [self.folders[i] for i in indices]
        return Part(self.folder, paths, folders, self.classes)


class Pictures(Dataset):
    """Image files through a transform. Its `labels` are set by `number_classes`, its `shape` once one is known.

    grey: they have one channel, not three.
    """

    def __init__(self, part: Part, transform: Callable):
        self.part, self.transform = part, transform
        self.labels = [NO_LABEL] * len(part.paths)
        self.shape: torch.Size | None = None
        self.grey = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.part.paths[index]
        image = self.transform(read_picture(path, self.grey))
        if self.shape not in (None, image.shape):
            raise UsageError(
                f"{path} becomes {pixels(image.shape)} where others are {pixels(self.shape)}, since the network's "
                f"transform does not resize: `resize` gives all of them one size."
            )
        return image, self.labels[index]


def pixels(shape: Sequence[int]) -> str:
    return f"{shape[-1]} x {shape[-2]} pixels"


def image_folders(folder: Path, transform: Callable) -> tuple[Pictures, Pictures]:
    """The training and test images of a directory, with a folder for each class or without.

    The parts are train/ and val/, or what else they may be called; where there is one alone, or no parts but images or
    class folders, half of the images test.

    Raises:
        UsageError: there are no images.
    """
    found = [next(named(folder, names), None) for names in (TRAIN, TEST)] if folder.is_dir() else []
    if found and all(found):
        train, test = (part_of(each) for each in found if each)
    else:
        alone = next(filter(None, found), folder)
        if alone is folder and not (folder.is_dir() and holds_images(folder)):
            raise UsageError(
                f"{folder} has neither train/ nor val/ with one folder per class, nor images (`data_dir` or `dset`)."
            )
        whole = part_of(alone)
        train, test = (whole.of(indices) for indices in halves(len(whole.paths), alone))
    return Pictures(train, transform), Pictures(test, transform)


def named(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """The directories of a folder that have one of these names, in any case, in the order of the names."""
    inner = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    return (inner[name] for name in names if name in inner)


def holds_images(folder: Path) -> bool:
    """Whether images lie in the folder or in the folders in it."""
    return any(is_image(entry.name) for place in (folder, *visible(folder)) for entry in place.iterdir())


def visible(folder: Path) -> list[Path]:
    """The directories in a folder, without those that programs leave there."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(HIDDEN))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def part_of(folder: Path) -> Part:
    """The images of a part: those in class folders, however deep, or else those that lie in it without labels.

    Raises:
        UsageError: there are none.
    """
    inside = {each.name: images_below(each) for each in visible(folder)}
    paths = [path for found in inside.values() for path in found]
    folders = [name for name, found in inside.items() for _ in found]
    if not paths:
        inside, paths = {}, [str(path) for path in sorted(folder.iterdir()) if is_image(path.name)]
        folders = [""] * len(paths)
    if not paths:
        raise UsageError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)}), nor folders of them.")
    return Part(folder, paths, folders, sorted(inside))


def images_below(folder: Path) -> list[str]:
    """The image files in a folder and in those below it."""
    found = sorted(os.walk(folder, followlinks=True))
    return [os.path.join(root, name) for root, _, names in found for name in sorted(names) if is_image(name)]


def read_classes(path: Path) -> list[str]:
    """The lines of a file: class folders in the order of a network's outputs.

    Raises:
        UsageError: it cannot be read, is empty, or names one twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} (`classes`) as a text with a class folder per line.") from error
    classes = [line for line in lines if line]
    twice = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    if twice or not classes:
        raise UsageError(f"{path} (`classes`) {f'names {listed(twice)} twice' if twice else 'is empty'}.")
    return classes


def number_classes(train: Pictures, test: Pictures, outputs: int, classes: Sequence[str] | None) -> None:
    """Give the images their labels: the place of their folder among the classes.

    The classes are those given; or ImageNet's, where all folders have names of its classes and the network has as many
    outputs; or all the folders in the order of their names.

    Raises:
        UsageError: the folders of the two parts contradict each other, or are not among the classes.
    """
    folders = sorted({*train.part.classes, *test.part.classes})
    if classes is None:
        synsets = imagenet_classes(outputs) if folders else []
        if set(folders) < set(synsets):
            log.info("%d of ImageNet's classes, by the names of their folders", len(folders))
            classes = synsets
        else:
            check_same(train.part, test.part)
            check_outputs(len(folders), outputs)
            classes = folders
    else:
        check_outputs(len(classes), outputs)
    unknown = [name for name in folders if name not in set(classes)]
    if unknown:
        raise UsageError(f"`classes` does not list the folders {listed(unknown)}.")
    number = {name: place for place, name in enumerate(classes)} | {"": NO_LABEL}
    for pictures in (train, test):
        pictures.labels = [number[name] for name in pictures.part.folders]


def check_same(train: Part, test: Part) -> None:
    """Refuse test images of classes that the training images do not have: then folders in order are no class numbers.

    Raises:
        UsageError: it lists them.
    """
    strange = sorted(set(test.classes) - set(train.classes))
    if train.classes and strange:
        raise UsageError(
            f"{test.folder} has class folders that {train.folder} lacks: {listed(strange)}. Give `classes`, a file "
            f"that lists all of them in the order of the network's outputs."
        )


def check_outputs(folders: int, outputs: int) -> None:
    """Refuse more classes than the network has outputs; warn of fewer.

    Raises:
        UsageError: there are more.
    """
    if folders > outputs:
        raise UsageError(f"there are {folders} classes, and the network has {outputs} outputs (`num_classes`).")
    if 0 < folders < outputs:
        log.warning(
            "%d classes are taken for the first of the network's %d outputs: if they are others, `classes` must list a "
            "line for each output", folders, outputs,
        )  # fmt: skip


def imagenet_classes(outputs: int) -> list[str]:
    """The folders of ImageNet's 1,000 classes, for a network with as many outputs."""
    names = timm.data.ImageNetInfo().label_names()
    return names if outputs == len(names) else []
