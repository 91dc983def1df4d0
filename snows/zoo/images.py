"""Images: the datasets known by name, a seeded calibration sample, and test batches."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from snows.calibration.store import room_for
from snows.errors import SnowsError, UsageError, first_line
from snows.zoo.arrays import Arrays, npz
from snows.zoo.folders import image_folders

log = logging.getLogger("snows")

DATASETS = ("digits", "cifar10", "cifar100", "imagenet")
NAME_OF_ERROR = f"{UsageError.__module__}.{UsageError.__name__}"
DIGITS_TEST = 597  # of the 1,797 digits, the last ones


@dataclass
class Data:
    """Training images (for calibration; their labels are never read) and test images, both through one transform.

    skip_broken: whether to leave out images that cannot be read, instead of ending with the first.
    """

    train: Dataset
    test: Dataset
    num_workers: int = 0
    skip_broken: bool = False

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
        order = torch.randperm(len(self.train), generator=generator, device="cpu").tolist()
        indices = list(itertools.islice(self.sound(self.train, order), ngrads))
        if len(indices) < ngrads:
            raise UsageError(f"only {len(indices)} of the {ngrads} calibration images (`ngrads`) can be read.")
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

    def sound(self, dataset: Dataset, indices: Iterable[int]) -> Iterator[int]:
        """The images that can be read, where broken ones are to be left out; says which are."""
        for index in indices:
            try:
                if self.skip_broken:
                    dataset[index]
                yield index
            except UsageError as error:
                log.warning("left out: %s", str(error).partition(": ")[0])

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole test set in order, the last batch short."""
        return self.batches(self.test, batch_size)

    def batches(self, dataset: Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels, loaded by `num_workers` processes.

        Raises:
            SnowsError: the processes cannot be started or be heard. What an image raises, they only pass on.
            UsageError: an image cannot be read or has another size.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores
            try:
                yield from DataLoader(dataset, batch_size, num_workers=self.num_workers, worker_init_fn=be_quiet)
            except UsageError as error:  # a loading process puts its traceback above it
                raise UsageError(str(error).strip().splitlines()[-1].removeprefix(f"{NAME_OF_ERROR}: ")) from error
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


def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """PIL image -> float32 (c, h, w), normalised."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def load(dset: str, transform: Callable, data_dir: Path, num_workers: int = 0, skip_broken: bool = False) -> Data:
    """A dataset by name, by the path of a directory of images (see folders.py), or by the path of an .npz (arrays.py).

    data_dir: where cifar10, cifar100 and imagenet lie, or are downloaded to (imagenet cannot be downloaded).

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
        return Data(*image_folders(data_dir, transform), num_workers, skip_broken)
    if path.is_dir():
        return Data(*image_folders(path, transform), num_workers, skip_broken)
    if path.suffix.lower() == ".npz":
        return Data(*npz(path, transform), num_workers)
    raise UsageError(f"dataset '{dset}' is not one of {', '.join(DATASETS)}, nor an existing directory or .npz file.")


def digits(transform: Callable) -> tuple[Arrays, Arrays]:
    """scikit-learn's handwritten digits, 8 x 8 grey: 1,200 training images and 597 test images."""
    from sklearn.datasets import load_digits  # a slow import that only this dataset needs

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    cut = len(images) - DIGITS_TEST
    return Arrays(images[:cut], bunch.target[:cut], transform), Arrays(images[cut:], bunch.target[cut:], transform)
