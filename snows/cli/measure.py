"""How long a finished run's network takes on this machine, dense and pruned, on the runtimes that are installed.

    python -m snows.measure RUN_DIR [--threads 1] [--runs 20]

Writes latency.json into the folder and draws its report.html anew. The dense network is the pruned one with random
numbers for its zeros: time does not depend on which numbers.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from snows.cli import run_folder
from snows.cli.flags import whole
from snows.cli.report import write_report
from snows.deploy.backends import BACKENDS, Backend
from snows.deploy.measure import DENSE, PRUNED, Measured, as_rows, measure, refilled, sentence
from snows.errors import SnowsError, UsageError, first_line
from snows.zoo.registry import CHECKPOINTS, Known, load_classifier

OWN = "give --factory FILE.py:NAME, a function without arguments that returns the network"


def network_of(arguments: dict, factory: str | None) -> nn.Module:
    """The network that a run pruned, with random weights.

    Raises:
        UsageError: neither the script that ran, nor torchvision, nor timm knows it, or the factory does not give it.
    """
    if factory is not None:
        return from_factory(factory)
    known = known_to(arguments["script"])
    try:
        return load_classifier(
            arguments["arch"], known, random_weights=True, num_classes=arguments.get("num_classes")
        ).model
    except UsageError as error:
        raise UsageError(f"{str(error).rstrip('.')}. For a network of your own {OWN}.") from error


def known_to(script: str) -> Known:
    """The networks that the script of a run knows by name, where this is a checkout."""
    folder = CHECKPOINTS.parent / Path(script).parent
    if not (folder / "utils.py").is_file():
        return {}
    sys.path.insert(0, str(folder))
    try:
        return runpy.run_path(str(folder / "utils.py")).get("KNOWN", {})
    finally:
        sys.path.remove(str(folder))


def from_factory(factory: str) -> nn.Module:
    """What the function FILE.py:NAME returns.

    Raises:
        UsageError: there is none, it fails, or returns no network.
    """
    file, _, name = factory.rpartition(":")
    if not Path(file).is_file():
        raise UsageError(f"--factory {factory}: there is no file '{file}'; {OWN}.")
    try:
        network = runpy.run_path(file)[name]()
    except Exception as error:  # whatever a user's file raises
        raise UsageError(f"--factory {factory}: {type(error).__name__}: {first_line(error)}; {OWN}.") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"--factory {factory} returns no nn.Module; {OWN}.")
    return network


def images_of(metrics: dict, shape: list[int] | None, count: int) -> torch.Tensor:
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
            raise UsageError(f"{name} needs packages that are not installed: pip install {needed([name])}.")
    return {name: BACKENDS[name] for name in names or BACKENDS}


def needed(names: list[str]) -> str:
    return " ".join(dict.fromkeys(package for name in names for package in BACKENDS[name].missing))


def versions(backends: Mapping[str, Backend]) -> dict[str, str]:
    """Of the packages that backends ran on."""
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


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m snows.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN_DIR")
    parser.add_argument("--threads", type=whole(1), default=1, help="of the processor (default: %(default)s)")
    parser.add_argument("--runs", type=whole(1), default=20, help="forward passes of each (default: %(default)s)")
    parser.add_argument("--batch_size", type=whole(1), default=1, help="images of a pass (default: %(default)s)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, metavar="NAME", help="; ".join(BACKENDS))
    parser.add_argument("--factory", metavar="FILE.py:NAME", help="what makes a network of your own")
    axes = ("CHANNELS", "HEIGHT", "WIDTH")
    parser.add_argument("--image_shape", type=whole(1), nargs=3, metavar=axes, help="where the run does not say it")
    return parser


def main():
    args = flags().parse_args()
    metrics = run_folder.read_json(args.folder / "metrics.json", "arch", "finished")
    arguments = run_folder.read_json(args.folder / "args.json", "script")
    if not metrics["finished"]:
        raise UsageError(f"{args.folder} is not finished: go on with it (--resume) before it is measured.")
    backends = chosen(args.backends)
    images = images_of(metrics, args.image_shape, args.batch_size)
    pruned, masks = run_folder.load(args.folder, network_of(arguments, args.factory))
    networks = {DENSE: refilled(pruned, masks), PRUNED: pruned}
    print(f"milliseconds of {args.batch_size} image(s), {args.threads} thread(s), least of {args.runs} runs, in turn")
    print(f"  {'':<25} {'wall':>9} {'CPU':>9}")
    with run_folder.locked(args.folder):
        rows = []
        for row in measure(networks, images, backends, args.threads, args.runs):
            print(line(row), flush=True)
            rows.append(row)
        if all(row.problem for row in rows):
            raise SnowsError(f"nothing could be measured: {rows[0].problem}")
        absent = [name for name, backend in backends.items() if backend.missing]
        record = {
            "environment": {**run_folder.environment("cpu"), "threads": args.threads, **versions(backends)},
            **{name: getattr(args, name) for name in ("threads", "runs", "batch_size")},
            "image_shape": list(images.shape[1:]),
            "rows": as_rows(rows),
            "not_installed": {name: BACKENDS[name].missing for name in absent},
            "said": sentence(rows),
        }
        run_folder.write_json(args.folder / "latency.json", record)
        write_report([args.folder], args.folder / "report.html")
    if absent:
        print(f"  not installed: {', '.join(absent)} (pip install {needed(absent)})")
    print(f"{record['said']}\nsaved in {args.folder / 'latency.json'}")


if __name__ == "__main__":
    from snows.cli.shell import shell

    shell(main)
