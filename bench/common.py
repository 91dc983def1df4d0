"""What the benches share: the project's path, their flags, results as CSV, figures, and runs in processes of their own.

A bench imports this before anything of the project. The project itself is imported where it is needed, because it takes
seconds that the reading of a table does not.
"""

import argparse
import csv
import fcntl
import io
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning"), str(ROOT / "VIT_pruning")]

# Columns whose cells are text even where they look like numbers.
TEXT = {"pattern", "flags", "layer", "commit", "weights", "weights_checksum", "masks_checksum", "calibration_checksum"}
FLAGS = {  # what several benches take
    "--device": dict(default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)"),
    "--checkpoint": dict(type=Path, help="the network's weights (default: what ships in checkpoints/)"),
    "--dset": dict(type=Path, required=True, help="an .npz of CIFAR-10"),
    "--seeds": dict(type=int, nargs="+", default=[0], help="a row for each (default: %(default)s)"),
}


def pattern_of(text: str):
    """The pattern "2:4", or "0.7" of all parameters.

    Raises:
        UsageError: it is neither.
    """
    import snows
    from snows.errors import UsageError

    if ":" in text:
        return snows.NM.parse(text)
    try:
        return snows.Unstructured(float(text))
    except ValueError:
        raise UsageError(f"pattern '{text}' is neither N:M nor a sparsity.") from None


class Parser(argparse.ArgumentParser):
    """A bench's flags: those of FLAGS that it names, --threads, --out, and what it adds.

    out: the name of its results file, which may depend on its flags: "compare_{network}.csv"; None: it says itself.
    """

    def __init__(self, doc: str, out: str | None, *shared: str):
        from snows.cli.flags import whole

        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.name = out
        for flag in shared:
            self.add_argument(flag, **FLAGS[flag])
        self.add_argument("--threads", type=whole(1), help="of the processor (default: as OMP_NUM_THREADS says)")
        self.add_argument("--out", type=Path, help=f"results file (default: results/{out or 'TABLE.csv'})")

    def parse(self) -> argparse.Namespace:
        """The flags, with the results file filled in; from now on this process has as many threads as they say."""
        args = self.parse_args()
        if args.out is None and self.name:
            args.out = RESULTS / self.name.format_map(vars(args))
        if args.out and args.out.suffix != ".csv":
            self.error(f"--out {args.out}: results are CSV files, give a name that ends in .csv")
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
            os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for processes of its own
        return args


def side_file(path: Path) -> Path:
    """Where the settings lie that rows of a results file share."""
    return path.with_suffix(".settings.json")


def settings(path: Path) -> dict:
    """What rows of a results file share: {column: [dict, ...]}, and the checksums of what they are "of"."""
    return json.loads(side_file(path).read_text()) if side_file(path).exists() else {}


def read(path: Path) -> list[dict]:
    """The rows of a results file, with the dicts that they share; an empty cell is None, or "" in a column of text."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{name: value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    shared = {name: dicts for name, dicts in settings(path).items() if isinstance(dicts, list)}
    for row in rows:
        row.update({name: dicts[row[name]] for name, dicts in shared.items() if row.get(name) is not None})
    return rows


def value(name: str, cell: str) -> object:
    """What a cell holds: text in columns of TEXT, a number, true or false elsewhere where it is one."""
    if name in TEXT:
        return cell
    try:
        return json.loads(cell) if cell else None
    except ValueError:
        return cell


def write(path: Path, rows: list[dict], of: dict | None = None) -> None:
    """Write rows as CSV. A dict is kept once, in the side file, and the row has its place in that list, from 0."""
    from snows.cli import files

    shared, lines = {}, []
    for row in rows:
        line = {}
        for name, cell in row.items():
            if isinstance(cell, dict):
                kept = shared.setdefault(name, [])
                if cell not in kept:
                    kept.append(cell)
                cell = kept.index(cell)
            line[name] = cell if isinstance(cell, str | None) else json.dumps(cell)
        lines.append(line)
    columns = sorted(dict.fromkeys(name for line in lines for name in line), key=lambda name: name in shared)
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    if shared or of:  # before the rows, which a reader reads first: whatever they point at is there
        files.write(side_file(path), laid_out(({"of": of} if of else {}) | shared))
    files.write(path, text.getvalue())


def laid_out(record: dict) -> str:
    """JSON with a line for each item of a list."""

    def text(item: object) -> str:
        lines = ",\n".join(f"    {json.dumps(each)}" for each in item)
        return f"[\n{lines}\n  ]" if isinstance(item, list) else json.dumps(item)

    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {text(item)}" for name, item in record.items()) + "\n}\n"


class Results:
    """A results file that fills row by row: what it holds is not measured again, and several processes may fill it.

    Start a bench as often as there are cores or GPUs for it, with the same --out: each process takes the next row that
    no other is at. A process that is stopped gives its row back. An empty .lock file beside the CSV holds the claims.

    of: the files that the rows are of, weights and images.

    Raises:
        UsageError: the file holds rows of others, or there is no such file.
    """

    def __init__(self, path: Path, device: str = "cpu", of: Sequence[Path] = ()):
        from snows.errors import UsageError

        self.path, self.device = path, device
        missing = [str(file) for file in of if not file.is_file()]
        if missing:
            raise UsageError(f"no such file: {', '.join(missing)}")
        self.of = {file.name: f"{zlib.crc32(file.read_bytes()):08x}" for file in of}
        before = settings(path).get("of", self.of)
        if before != self.of:
            raise UsageError(f"{path} holds rows of {before}, not of {self.of}: give another --out.")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Open as long as this object lives: closing it anywhere would free all the locks of the process.
        self.locks = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)

    def rows(self) -> list[dict]:
        """All the rows, as the file stands."""
        return read(self.path)

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

    def add(self, *rows: dict) -> None:
        """Write rows behind those that the file holds by now, all of them or none."""
        with self._locked(0, wait=True):
            write(self.path, [*self.rows(), *map(self._signed, rows)], self.of)

    def replace(self, rows: list[dict]) -> None:
        """Write these rows in place of all that the file holds."""
        with self._locked(0, wait=True):
            write(self.path, [self._signed(row) for row in rows], self.of)

    def _signed(self, row: dict) -> dict:
        """The row with the machine and the versions that it was measured on, where it does not say so itself."""
        from snows.cli.environment import environment_of

        return row if row.get("environment") else {**row, "environment": environment_of(self.device)}

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


def one_run(script: str, *flags: object) -> dict:
    """What `python SCRIPT FLAGS` prints last, as JSON: a run in its own process; {"failed": why} where it fails."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, script, *map(str, flags)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        errors.seek(0)
        said = errors.read().strip().splitlines() or [f"exit code {done.returncode}"]
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": said[-1]}


def panels(rows: int, columns: int, width: float, height: float, **how):
    """(figure, array of axes (rows, columns)): drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def save_figure(figure, out: Path, kind: str = "svg") -> None:
    """Write a figure to figures/ beside the results file that it draws, under its name."""
    path = out.parent / "figures" / f"{out.stem}.{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
