"""The paper's tables and its field's as one command: networks x patterns x methods x seeds, on what is at hand.

    python bench/paper.py --weights_dir WEIGHTS --data_dir DATA [--devices cuda:0 cuda:1] [--workers 2] [--seeds 0 1 2]
    python bench/paper.py --check ...

A network whose weights or images are missing is left out, and the line that says so says what to do; --check says it of
all the networks and measures nothing. Weights: --weights_dir/NETWORK.pt (.pth, .bin, .safetensors), else what ships, is
installed or can be downloaded. Images: --data_dir/cifar10.npz or --data_dir/imagenet with train and val, and the like.

--workers processes run on each of --devices, each on the next run that no other is at. Rows that the results file holds
are not measured again, so the same command goes on where it stopped. At the end, and with what there is by then, it
writes the tables beside the results file, in Markdown and LaTeX, and draws the plots.

The methods are masks alone (MP, Wanda), least squares (MP+), SparseGPT, and SNOWS with each preset; `paper` has the
published K. --random_weights runs the same on images of noise: it says that the grid runs, and nothing of accuracy.
"""

import argparse
import itertools
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from common import Parser, Results, pattern_of, save_figure
from paper_networks import NETWORKS, Subject
from paper_tables import PATTERNS, latex, markdown, plot

import snows
from snows.arguments import check_device
from snows.cli.flags import whole
from snows.cli.shell import shell
from snows.errors import Interrupted, SnowsError
from snows.options import PRESETS
from snows.zoo.evaluate import score

METHODS = {  # name -> arguments of snows.prune
    "MP": {"algo": "MP"},
    "Wanda": {"algo": "MP", "mask_alg": "Wanda"},
    "MP+": {"algo": "MP+"},
    "SparseGPT": {"algo": "SparseGPT", "mask_alg": "SparseGPT"},
}
METHODS |= {f"SNOWS {preset}": {"algo": "SNOWS", "preset": preset} for preset in PRESETS}


def grid(args: argparse.Namespace) -> list[dict]:
    """What each row runs, network by network; magnitude masks alone depend on no seed."""
    shared = {"random_weights": args.random_weights, "test_images_asked": args.test_images}
    return [
        {"network": n, "pattern": p, "method": m, "seed": s, "images": args.images or NETWORKS[n].images, **shared}
        for n, s, p, m in itertools.product(args.networks, args.seeds, args.patterns, args.methods)
        if m != "MP" or s == args.seeds[0]
    ]


def arguments_of(run: dict) -> dict:
    """The arguments of snows.prune beside the network and its images."""
    how = dict(METHODS[run["method"]])
    preset = how.pop("preset", "best")
    options = snows.Options.preset(preset, seed=run["seed"])
    if preset == "paper":
        options = options.but(k_step=NETWORKS[run["network"]].k_step)
    return {"pattern": pattern_of(run["pattern"]), "options": options, **how}


def measure(subject: Subject, run: dict) -> dict:
    """The figures of one row."""
    dense, logits = subject.dense
    calibration, _ = subject.data.calibration(run["images"], run["seed"])
    how = arguments_of(run)
    layers = subject.entry.prunes(subject.model)
    pruned = snows.prune(subject.model, calibration, **how, layers=layers, device=subject.device)
    found, _ = score(pruned.model, subject.test(), subject.device, logits)
    return {
        "dense_accuracy": dense.accuracy,
        **asdict(found),
        "sparsity": pruned.sparsity,
        "curvature_products": pruned.curvature_products,
        "seconds": pruned.seconds,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "test_images": len(logits),
        "problems": "; ".join(f"{layer}: {reason}" for layer, reason in pruned.problems.items()),
        "weights_checksum": subject.checksum,
        "options": {name: value for name, value in vars(how["options"]).items() if name != "seed"},
    }


def opened(name: str, args: argparse.Namespace, device: str, results: Results) -> Subject | None:
    """A network of the grid; None, said in a line, where something is missing or its rows are of other weights."""
    try:
        subject = Subject(name, args, device)
        kind = {"network": name, "random_weights": args.random_weights}
        known = {row["weights_checksum"] for row in results.rows() if kind.items() <= row.items()}
        if known - {subject.checksum}:
            raise SnowsError(f"{results.path} holds rows of other weights than {subject.checksum}: give another --out.")
        return subject
    except SnowsError as error:
        print(f"{name}: left out: {error}", flush=True)
        return None


def work(args: argparse.Namespace, results: Results, device: str) -> None:
    """Measure what no row holds and no other process is at; one network is held at a time."""
    check_device(device)
    name, subject, absent = None, None, set()
    for place, run in results.claimed(grid(args)):
        if run["network"] in absent:
            continue
        if run["network"] != name:
            name, subject = run["network"], opened(run["network"], args, device, results)
        if subject is None:
            absent.add(name)
            continue
        said = f"{place}: {name} {run['pattern']} {run['method']} {run['seed']}"
        try:
            figures = measure(subject, run)
        except Interrupted:
            raise
        except SnowsError as error:  # a sparsity out of the network's reach, say: the others go on
            print(f"{said}: left out: {error}", flush=True)
            continue
        results.add({**run, **figures})
        print(f"{said}: {figures['accuracy']} %, {figures['seconds']:.0f} s", flush=True)


def start_workers(devices: list[str], each: int) -> None:
    """Run this command in processes of its own, so many on each device, until all have ended.

    Raises:
        SnowsError: one of them failed; it has said why.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--workers", "1", "--worker", "--devices"]
    processes = [subprocess.Popen([*command, device]) for device in devices for _ in range(each)]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if any(codes):
        raise SnowsError(f"{sum(map(bool, codes))} of {len(codes)} workers failed: start the same command to go on.")


def write_tables(path: Path, rows: list[dict]) -> None:
    """The tables beside the results file, and the plots."""
    rows = [row for row in rows if row["accuracy"] is not None]
    if not rows:
        print("no row to make a table of")
        return
    titles = {name: entry.title for name, entry in NETWORKS.items()}
    path.with_suffix(".md").write_text(markdown(rows, titles, tuple(METHODS)))
    path.with_suffix(".tex").write_text(latex(rows, titles, tuple(METHODS)))
    save_figure(plot(rows, titles, tuple(METHODS)), path)
    print(f"{path.with_suffix('.md')}, {path.with_suffix('.tex').name} and figures/{path.stem}.svg are written")


def flags() -> Parser:
    parser = Parser(__doc__, "paper.csv", "--seeds")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=whole(1), help="that calibrate (default: each network's own number)")
    parser.add_argument("--test_images", type=whole(0), default=0, help="about so many, evenly spread; 0: all")
    parser.add_argument("--weights_dir", type=Path, help="folder of NETWORK.pt, .pth, .bin, .safetensors")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of the images (default: data)")
    parser.add_argument("--num_workers", type=whole(0), default=0, help="processes that load images, of each worker")
    parser.add_argument("--random_weights", action="store_true", help="and images of noise: to see that the grid runs")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, cuda:0, cuda:1, ... (default: cpu)")
    parser.add_argument("--workers", type=whole(1), default=1, help="processes on each device (default: 1)")
    parser.add_argument("--check", action="store_true", help="only say of each network what is missing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of those that main starts
    return parser


def main():
    args = flags().parse()
    results = Results(args.out, args.devices[0])
    if args.check:
        for name in args.networks:
            if opened(name, args, "cpu", results):
                print(f"{name}: weights and images are at hand", flush=True)
        return
    try:
        if len(args.devices) * args.workers == 1:
            work(args, results, args.devices[0])
        else:
            start_workers(args.devices, args.workers)
    finally:
        if not args.worker:
            shown = {"random_weights": args.random_weights, "test_images_asked": args.test_images}
            write_tables(args.out, [row for row in results.rows() if shown.items() <= row.items()])


if __name__ == "__main__":
    shell(main)
