"""How long a finished run's network takes on this machine, dense and pruned, on the runtimes that are installed.

    python -m snows.measure RUN_DIR [--threads 1] [--runs 20]

Writes latency.json into the folder and draws its report.html anew. The dense network is the pruned one with random
numbers for its zeros: time does not depend on which numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from snows.cli import files, finished, run_folder
from snows.cli.environment import environment_of
from snows.cli.flags import whole
from snows.cli.report import write_report
from snows.deploy.backends import BACKENDS, Backend
from snows.deploy.measure import DENSE, PRUNED, Measured, as_rows, measure, refilled, sentence
from snows.deploy.packages import HOW_TO_INSTALL
from snows.errors import SnowsError, UsageError, first_line


def images_of(metrics: dict, shape: list[int] | None, count: int) -> Tensor:
    """Random images of the shape that a run's had.

    Raises:
        UsageError: the run, of an earlier version, does not say it.
    """
    shape = shape or metrics.get("image_shape")
    if shape is None:
        raise UsageError("the run does not say how large its images are: give --image_shape CHANNELS HEIGHT WIDTH.")
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def chosen(names: list[str] | None) -> dict[str, Backend]:
    """The backends to measure: those that are asked for, or all.

    Raises:
        UsageError: one that is asked for is not installed.
    """
    for name in names or []:
        if BACKENDS[name].missing:
            absent = " and ".join(BACKENDS[name].missing)
            raise UsageError(f"{absent} not installed, which {name} needs: {HOW_TO_INSTALL}.")
    return {name: BACKENDS[name] for name in names or BACKENDS}


def versions(backends: Mapping[str, Backend]) -> dict[str, str]:
    """The versions of the packages that backends ran on."""
    found = {}
    for package in dict.fromkeys(package for backend in backends.values() for package in backend.needs):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def line(row: Measured) -> str:
    if row.problem:
        return f"  {row.backend:<16} {row.network:<8} {row.problem}"
    return f"  {row.backend:<16} {row.network:<8} {row.wall_ms:9.2f} {row.cpu_ms:9.2f}"


@torch.no_grad()
def check_images(network: nn.Module, images: Tensor) -> None:
    """Refuse images that a network cannot take.

    Raises:
        UsageError: it says why.
    """
    try:
        network.eval()(images[:1])
    except Exception as error:  # whatever a forward pass raises
        shape, why = "x".join(map(str, images.shape[1:])), first_line(error).rstrip(".")
        raise UsageError(f"the network takes no images of {shape} (--image_shape): {why}.") from error


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m snows.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    finished.add_run_flags(parser)
    parser.add_argument("--threads", type=whole(1), default=1, help="of the processor (default: %(default)s)")
    parser.add_argument("--runs", type=whole(1), default=20, help="forward passes of each (default: %(default)s)")
    parser.add_argument("--batch_size", type=whole(1), default=1, help="images of a pass (default: %(default)s)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, metavar="NAME", help="; ".join(BACKENDS))
    axes = ("CHANNELS", "HEIGHT", "WIDTH")
    parser.add_argument("--image_shape", type=whole(1), nargs=3, metavar=axes, help="where the run does not say it")
    return parser


def main():
    args = flags().parse_args()
    metrics, saved = finished.read(args.run)
    backends = chosen(args.backends)
    images = images_of(metrics, args.image_shape, args.batch_size)
    pruned, masks = run_folder.load(args.run, finished.network_of(args.run, saved, None, args.factory).model)
    networks = {DENSE: refilled(pruned, masks), PRUNED: pruned}
    check_images(pruned, images)
    print(f"milliseconds of {args.batch_size} image(s), {args.threads} thread(s), least of {args.runs} runs, in turn")
    print(f"  {'':<25} {'wall':>9} {'CPU':>9}")
    with run_folder.locked(args.run):
        rows = []
        for row in measure(networks, images, backends, args.threads, args.runs):
            print(line(row), flush=True)
            rows.append(row)
        if all(row.problem for row in rows):
            raise SnowsError(f"nothing could be measured: {rows[0].problem}")
        absent = [name for name, backend in backends.items() if backend.missing]
        record = {
            "environment": {**environment_of("cpu"), "threads": args.threads, **versions(backends)},
            **{name: getattr(args, name) for name in ("threads", "runs", "batch_size")},
            "image_shape": list(images.shape[1:]),
            "rows": as_rows(rows),
            "not_installed": {name: BACKENDS[name].missing for name in absent},
            "said": sentence(rows),
        }
        files.write_json(args.run / "latency.json", record)
        write_report([args.run], args.run / "report.html")
    if absent:
        print(f"  not installed: {', '.join(absent)} ({HOW_TO_INSTALL})")
    print(f"{record['said']}\nsaved in {args.run / 'latency.json'}")


if __name__ == "__main__":
    from snows.cli.shell import shell

    shell(main)
