"""Files that are written whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from snows.errors import UsageError, WriteError


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
        WriteError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict | list) -> None:
    write(path, json.dumps(finite(record), indent=2, default=str, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have: NaN, and infinity."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *names: str) -> Any:
    """A JSON file of a run; with names, an object that has them.

    Raises:
        UsageError: the file is missing, damaged or none of a run's.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path.parent} holds no run that can be read: {path.name}: {error}") from error
    missing = [name for name in names if not isinstance(record, dict) or name not in record]
    if missing:
        raise UsageError(f"{path.parent} holds no run that can be read: {path.name} lacks {', '.join(missing)}")
    return record
