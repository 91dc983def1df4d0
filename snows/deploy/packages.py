"""The packages that runtimes need, all of them in one extra."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

HOW_TO_INSTALL = 'pip install ".[deploy]" in a checkout'


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed, each once."""
    return [package for package in dict.fromkeys(packages) if find_spec(package) is None]
