"""Images: the datasets known by name, a seeded calibration sample, and test batches."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from snows.calibration.store import room_for
from snows.errors import SnowsError, UsageError, first_line

DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
DIGITS_TEST = 597  # of the 1,797 digits, the last ones


@dataclass
class Data:
    """Training images (for calibration; their labels are never read) and test images, both through one transform."""

    train: Dataset
    test: Dataset
    num_workers: int = 0

    def check_enough(self, ngrads: int) -> None:
        """Refuse to draw more images than there are.

        Raises:
            UsageError: there are fewer.
        """
        if not 0 < ngrads <= len(self.train):
            raise UsageError(f"cannot draw {ngrads} calibration images (`ngrads`) from {len(self.train)}.")

    def calibration(
        self, ngrads: int, seed: int, mirror: bool = False, cache_dir: str = ""
    ) -> tuple[Tensor, list[int]]:
        """(images (ngrads, c, h, w), their indices): a seeded sample of the training set, without replacement.

        mirror: flip each image left to right with probability 1/2.
        cache_dir: the folder for images of more than a GiB; see snows/calibration/store.py.

        Raises:
            UsageError: more images are asked for than there are.
        """
        self.check_enough(ngrads)
        torch.manual_seed(seed)  # a transform that the user edits in may draw random numbers
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(self.train), generator=generator, device="cpu")[:ngrads].tolist()
        images: Any = None
        done = 0
        for batch, _ in self.batches(Subset(self.train, indices), 64):
            if images is None:
                images = room_for(torch.Size((ngrads, *batch.shape[1:])), batch.dtype, cache_dir)
            images[done : done + len(batch)] = batch
            done += len(batch)
        if mirror:
            chosen = torch.rand(ngrads, generator=generator, device="cpu") < 0.5
            images[chosen] = images[chosen].flip(-1)
        return images, indices

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set in order, the last batch short."""
        return self.batches(self.test, batch_size)

    def batches(self, dataset: Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels, loaded by `num_workers` processes.

        Raises:
            SnowsError: the processes cannot be started or be heard. What an image raises, they only pass on.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores
            try:
                yield from DataLoader(dataset, batch_size, num_workers=self.num_workers, worker_init_fn=be_quiet)
            except (OSError, RuntimeError, EOFError) as error:
                if self.num_workers == 0 or str(error).startswith("Caught "):
                    raise
                why = first_line(error).split(". ")[0]
                raise SnowsError(
                    f"the {self.num_workers} processes that load images fail: {why}. Lower `num_workers` "
                    f"(0: this process loads them), or raise the limits of open files (ulimit -n) and shared memory."
                ) from error


def be_quiet(worker: int) -> None:
    """Let a process that loads images say nothing itself: what it has to tell, the process that started it hears."""
    sys.stderr = io.StringIO()


class Arrays(Dataset):
    """uint8 images (n, h, w) or (n, h, w, c) and labels (n,), through a transform of PIL images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """PIL image -> float32 (c, h, w), normalised."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def load(dset: str, transform: Callable, data_dir: Path, num_workers: int = 0) -> Data:
    """A dataset by name, by the path of an ImageFolder directory (train/, val/), or by the path of an .npz.

    data_dir: where cifar10, cifar100 and imagenet lie, or are downloaded to (imagenet cannot be downloaded).
    An .npz holds x_train, y_train, x_test, y_test: uint8 images (n, h, w, c) or (n, h, w) and labels (n,).

    Raises:
        UsageError: no such dataset, directory or file, or not of that form.
    """
    path = Path(dset)
    if dset == "digits":
        return Data(*digits(transform), num_workers)
    if dset in ("cifar10", "cifar100"):
        kind = torchvision.datasets.CIFAR10 if dset == "cifar10" else torchvision.datasets.CIFAR100
        try:
            train, test = (kind(data_dir, train=part, download=True, transform=transform) for part in (True, False))
        except (OSError, RuntimeError) as error:
            raise SnowsError(
                f"cannot load {dset} from {data_dir} nor download it there: {error}. Put the extracted "
                f"{kind.base_folder} folder there (`data_dir`), or give an .npz as `dset`."
            ) from error
        return Data(train, test, num_workers)
    if dset == "imagenet":
        return Data(*image_folders(data_dir, transform), num_workers)
    if path.is_dir():
        return Data(*image_folders(path, transform), num_workers)
    if path.suffix == ".npz":
        return Data(*npz(path, transform), num_workers)
    raise UsageError(f"dataset '{dset}' is not one of {', '.join(DATASETS)}, nor an existing directory or .npz file.")


def digits(transform: Callable) -> tuple[Arrays, Arrays]:
    """scikit-learn's handwritten digits, 8 x 8 grey: 1,200 training images and 597 test images."""
    from sklearn.datasets import load_digits  # a slow import that only this dataset needs

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    cut = len(images) - DIGITS_TEST
    return Arrays(images[:cut], bunch.target[:cut], transform), Arrays(images[cut:], bunch.target[cut:], transform)


def image_folders(folder: Path, transform: Callable) -> tuple[Dataset, Dataset]:
    """train/ and val/ of a directory in ImageFolder layout; with only one of them, it serves as both."""
    found = [folder / part if (folder / part).is_dir() else None for part in ("train", "val")]
    if not any(found):
        raise UsageError(f"{folder} has neither train/ nor val/ with one folder per class (`data_dir` or `dset`).")
    train, val = (part or next(filter(None, found)) for part in found)
    try:
        return tuple(torchvision.datasets.ImageFolder(part, transform) for part in (train, val))
    except (FileNotFoundError, OSError) as error:
        raise UsageError(f"{folder} is not in ImageFolder layout: {error}") from error


def npz(path: Path, transform: Callable) -> tuple[Arrays, Arrays]:
    """x_train, y_train, x_test, y_test of an .npz file."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            arrays = {} if missing else {name: archive[name] for name in names}
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(names)}.")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"].squeeze()
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
            raise UsageError(
                f"{path}: x_{part} must be uint8 (n, h, w, c) or (n, h, w) and y_{part} (n,), "
                f"not {images.dtype} {images.shape} and {arrays[f'y_{part}'].shape}."
            )
        if images.ndim == 4 and images.shape[-1] == 1:
            images = images[..., 0]
        if 0 in images.shape or (images.ndim == 4 and images.shape[-1] != 3):
            raise UsageError(f"{path}: x_{part} must hold grey images or images of three colours, not {images.shape}.")
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UsageError(f"{path}: y_{part} must hold class numbers from 0 on, as integers.")
        arrays[f"x_{part}"], arrays[f"y_{part}"] = images, labels
    train, test = (Arrays(arrays[f"x_{part}"], arrays[f"y_{part}"], transform) for part in ("train", "test"))
    return train, test
