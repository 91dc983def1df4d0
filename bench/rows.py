"""A results file that fills row by row: what it holds is not measured again, and several processes may fill it.

Start a bench as often as there are cores or GPUs for it, with the same --out: each process takes the next row that no
other is at. A process that is stopped gives its row back.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from snows.cli import run_folder
from snows.errors import UsageError


class Results:
    """{"machine": ..., "of": ..., "rows": [...]} in a JSON file; beside it an empty .lock file that holds the claims.

    of: the files that the rows are of, weights and images.

    Raises:
        UsageError: the file holds rows of others, or there is no such file.
    """

    def __init__(self, path: Path, device: torch.device | str, of: Sequence[Path] = ()):
        self.path, self.device = path, device
        missing = [str(file) for file in of if not file.is_file()]
        if missing:
            raise UsageError(f"no such file: {', '.join(missing)}")
        self.of = {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in of}
        before = json.loads(path.read_text()).get("of", self.of) if path.exists() else self.of
        if before != self.of:
            raise UsageError(f"{path} holds rows of {before}, not of {self.of}: give another --out.")
        # Open as long as this object lives: closing it anywhere would free all the locks of the process.
        self.locks = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)

    def rows(self) -> list[dict]:
        """All the rows, as the file stands."""
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def missing(self, runs: list[dict]) -> list[dict]:
        """Those runs that no row holds; a row holds a run whose items are all among its own."""
        rows = self.rows()
        return [run for run in runs if not any(run.items() <= row.items() for row in rows)]

    def claimed(self, runs: list[dict]) -> Iterator[tuple[str, dict]]:
        """("i of n", run) for each missing run, when it is its turn and unless another process is at it or was."""
        missing = self.missing(runs)
        for i, run in enumerate(missing, 1):
            with self._locked(1 + zlib.crc32(json.dumps(run, sort_keys=True).encode())) as ours:
                if ours and self.missing([run]):
                    yield f"{i} of {len(missing)}", run

    def add(self, row: dict) -> None:
        """Write a row behind those that the file holds by now."""
        with self._locked(0, wait=True):
            rows = [*self.rows(), {**row, "environment": run_folder.environment(self.device)}]
            run_folder.write_json(self.path, {"machine": run_folder.machine(self.device), "of": self.of, "rows": rows})

    @contextmanager
    def _locked(self, place: int, wait: bool = False) -> Iterator[bool]:
        """Whether the lock at this place is ours, held in the meantime; the system frees a dead process's."""
        try:
            fcntl.lockf(self.locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.locks, fcntl.LOCK_UN, 1, place)
