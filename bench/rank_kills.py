"""Runs of two processes of which one is killed at a random moment: how soon the other ends, and what the run comes to.

    python bench/rank_kills.py [--kills 20] [--ranks 2] [--out FILE]

One row per kill: which process, after how many layers, the seconds until all the others had ended, how many lines said
why, and whether the run that went on ended with the bits of one that nobody disturbed.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Parser, Results
from safetensors.torch import load_file

from snows.cli.shell import shell

FLAGS = "--ngrads 32 --schedule 0 --joint_CG_iterations 2 --max_CG_iterations 2 --k_step 1 --skip_evaluation --quiet"
LAYERS = 22  # of the network that the script prunes without flags


def started(ranks: int, *flags: object) -> subprocess.Popen:
    """The command of a run, by torchrun's module."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks]
    command += [ROOT / "CNN_pruning" / "unstr.py", *flags]
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def processes(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that a launcher has started and that live."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            lines = (status.parent / "environ").read_text().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        rank = [int(line[5:]) for line in lines if line.startswith("RANK=")]
        if int(parent) == launcher and state != "Z" and rank:
            found[rank[0]] = int(status.parent.name)
    return found


def kill_one(number: int, ranks: int, folder: Path) -> dict:
    """Begin a run and kill one of its processes; the other figures of its row."""
    chance = random.Random(number)
    rank, after, pause = chance.randrange(ranks), chance.randint(1, LAYERS - 1), chance.random()
    run = started(ranks, *FLAGS.split(), "--out_dir", folder)
    while len(list(folder.glob("steps/*.safetensors"))) < after and run.poll() is None:
        time.sleep(0.02)
    time.sleep(pause)
    os.kill(processes(run.pid)[rank], signal.SIGKILL)
    killed = time.monotonic()
    while processes(run.pid):
        time.sleep(0.05)
    seconds = time.monotonic() - killed
    lines = [line for line in run.communicate()[1].splitlines() if line.startswith("error:")]
    return {"rank": rank, "after_layers": after, "seconds": seconds, "lines": len(lines), "exit_code": run.returncode}


def main():
    parser = Parser(__doc__, "rank_kills.csv")
    parser.add_argument("--kills", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run (default: %(default)s)")
    args = parser.parse()
    results = Results(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary, "whole")
        started(args.ranks, *FLAGS.split(), "--out_dir", whole).communicate()
        wanted = load_file(whole / "model.safetensors")
        for number in range(args.kills):
            folder = Path(temporary, str(number))
            row = kill_one(number, args.ranks, folder)
            started(args.ranks, "--resume", folder, "--quiet").communicate()
            found = load_file(folder / "model.safetensors")
            same = all(found[name].equal(wanted[name]) for name in wanted)
            results.add({"number": number, "ranks": args.ranks, **row, "same_bits": same})
            print(f"{number}: {row}, same bits: {same}", flush=True)


if __name__ == "__main__":
    shell(main)
