"""Images that lie in arrays, as an .npz file holds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from snows.errors import UsageError, first_line, listed

log = logging.getLogger("snows")

NO_LABEL = -1  # of an image whose class nobody has told
NAMES = ("x_train", "y_train", "x_test", "y_test")


class Arrays(Dataset):
    """uint8 images (n, h, w) or (n, h, w, c) and labels (n,), if there are any, through a transform of PIL images."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, transform: Callable):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = NO_LABEL if self.labels is None else int(self.labels[index])
        return self.transform(Image.fromarray(self.images[index])), label


def halves(count: int, origin: Path) -> tuple[list[int], list[int]]:
    """Which images calibrate and which test, where they lie in one part: each half of them, always the same; says so.

    Raises:
        UsageError: there are not two.
    """
    if count < 2:
        raise UsageError(f"{origin} holds {count} images, which cannot both calibrate and test.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    calibrating, testing = sorted(order[: count // 2].tolist()), sorted(order[count // 2 :].tolist())
    log.info(
        "%s has one part: %d of its images, drawn at random with seed 0, calibrate, the other %d test",
        *(origin, len(calibrating), len(testing)),
    )
    return calibrating, testing


def npz(path: Path, transform: Callable) -> tuple[Arrays, Arrays]:
    """The images and labels of an .npz file: x_train, y_train, x_test, y_test, the labels of either part or of both.

    Without any there may be a single array too, of which half the images test.

    Raises:
        UsageError: it is no such file.
    """
    arrays = dict(read_npz(path))
    missing = [name for name in NAMES if name not in arrays]
    if len(arrays) == 1:
        ((name, images),) = arrays.items()
        images = grey_or_coloured(path, name, images)
        train, test = halves(len(images), path)
        return Arrays(images[train], None, transform), Arrays(images[test], None, transform)
    if {"x_train", "x_test"} & set(missing):
        raise UsageError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(NAMES)}, or images alone.")
    parts = []
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays.get(f"y_{part}")
        if labels is not None:
            check_labelled(path, part, images, labels)
            labels = labels.reshape(-1)
        parts.append(Arrays(grey_or_coloured(path, f"x_{part}", images), labels, transform))
    train, test = parts
    if train.images.ndim != test.images.ndim:
        raise UsageError(f"{path}: x_train and x_test must both be grey or both in colour.")
    return train, test


def read_npz(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of a file by name, at most those that are known and one more."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in NAMES if name in archive.files]
            if not names and len(archive.files) > 1:
                held, wanted = listed(archive.files), ", ".join(NAMES)
                raise UsageError(f"{path} holds {held}; it must hold {wanted}, or images alone.")
            return {name: archive[name] for name in names or archive.files}
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an .npz of plain arrays: {first_line(error)}") from error


def check_labelled(path: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Refuse images and labels that are not of one number, or labels that are no class numbers.

    Raises:
        UsageError: it says what they are.
    """
    one_a_line = labels.size == max(labels.shape, default=1)  # (n,), or as some write it (n, 1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not one_a_line or labels.size != len(images):
        raise UsageError(
            f"{path}: x_{part} must be uint8 (n, h, w, c) or (n, h, w) and y_{part} (n,), "
            f"not {images.dtype} {images.shape} and {labels.shape}."
        )
    if labels.size and (labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**63):
        raise UsageError(f"{path}: y_{part} must hold class numbers from 0 on, as integers of 64 bits.")


def grey_or_coloured(path: Path, name: str, images: np.ndarray) -> np.ndarray:
    """uint8 images (n, h, w) or (n, h, w, 3); one channel is taken as grey.

    Raises:
        UsageError: they are of another form.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise UsageError(f"{path}: {name} must be uint8 (n, h, w, c) or (n, h, w), not {images.dtype} {images.shape}.")
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if 0 in images.shape or (images.ndim == 4 and images.shape[-1] != 3):
        raise UsageError(f"{path}: {name} must hold grey images or images of three colours, not {images.shape}.")
    return images
