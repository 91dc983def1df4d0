"""Files for runtimes from a finished run: python -m snows.export RUN_DIR --to onnx [--out FILE]."""

from __future__ import annotations

import argparse
from pathlib import Path

from snows.cli import run_folder
from snows.cli.exporting import export_run, known_of
from snows.cli.flags import add_how_flags, how
from snows.cli.shell import shell
from snows.deploy.exports import EXPORTS, check_exports
from snows.errors import UsageError


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m snows.export", description=__doc__)
    flags.add_argument("run", type=Path, metavar="RUN_DIR", help="the folder of a finished run")
    flags.add_argument("--to", nargs="+", required=True, choices=EXPORTS, help="what to make of its network")
    flags.add_argument("--out", type=Path, help="where it goes (default: into RUN_DIR); with a single --to")
    flags.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    flags.add_argument(
        "--factory", metavar="FILE.py:NAME", help="the function that makes the network, where it is one of your own"
    )
    add_how_flags(flags)
    args = flags.parse_args()
    if args.out is not None and len(args.to) > 1:
        raise UsageError("--out is for a single --to.")
    check_exports(args.to, how(args))
    known = {} if args.factory else known_of(args.run)
    with run_folder.locked(args.run):
        export_run(args.run, tuple(args.to), how(args), known, args.data_dir, args.out, args.factory)


if __name__ == "__main__":
    shell(main)
