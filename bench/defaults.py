"""What the scripts do without flags: each pruned network's accuracy, time and products.

    python bench/defaults.py

One row per script: the metrics that its run leaves.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, Parser, Results

from snows.cli.shell import shell
from snows.errors import SnowsError

SCRIPTS = ("CNN_pruning/unstr.py", "VIT_pruning/prune_NM.py")


def measure(script: str, *flags: str) -> dict:
    """The metrics and the environment of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if subprocess.run([sys.executable, str(ROOT / script), *flags, "--out_dir", str(run)]).returncode:
            raise SnowsError(f"{script}: its run failed, for the reason above.")
        metrics = json.loads((run / "metrics.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
    problems = "; ".join(f"{layer}: {reason}" for layer, reason in metrics["problems"].items())
    options = {name: value for name, value in metrics["options"].items() if name != "seed"}
    return {**metrics, "problems": problems, "options": options, "environment": environment}


def main():
    parser = Parser(__doc__, "defaults.csv", "--device")
    args = parser.parse()
    results, rows = Results(args.out, args.device), []
    for script in SCRIPTS:
        rows.append(measure(script, "--device", args.device))
        results.replace(rows)
        print(f"{script}: {rows[-1]['accuracy']:.2f} %, {rows[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    shell(main)
