"""One image file: decoded, upright, eight bits a colour."""

from __future__ import annotations

import warnings
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from snows.errors import UsageError, first_line

SIXTEEN_BITS = 2**16 - 1


def read_picture(path: str, grey: bool = False) -> Image.Image:
    """An image file in RGB, or in grey, as its EXIF orientation says.

    Raises:
        UsageError: it is truncated, no image, or declared too large; the message names it.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of large images
            return eight_bits(upright(Image.open(file))).convert("L" if grey else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # each format has its own
        why = first_line(error).rstrip(".")
        raise UsageError(
            f"{path} cannot be read as an image: {why}. Mend it, or leave such out: `skip_broken`."
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say, where they can be read."""
    image.load()
    with suppress(Exception):  # whatever broken metadata raise: the pixels are there
        return ImageOps.exif_transpose(image)
    return image


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits or in floating point (0 to 1, or to 255 or 65,535 where they are larger) from 0 to 255.

    Nor do integers up to 255 become black, as programs write them that store eight bits in sixteen.

    Raises:
        ValueError: values are outside of that.
    """
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not (values.min() >= 0 and values.max() <= SIXTEEN_BITS):  # NaN neither
        raise ValueError(f"grey values from {values.min():g} to {values.max():g}, outside of 0 to {SIXTEEN_BITS}")
    tops = (1, 255, SIXTEEN_BITS) if image.mode == "F" else (255, SIXTEEN_BITS)
    largest = next(top for top in tops if values.max() <= top)
    return Image.fromarray(np.round(values * (255 / largest)).astype(np.uint8))
