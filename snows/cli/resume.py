"""Going on with a run: what must be as it was when it began, and what may change since its problem stays the same."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from snows import options
from snows.cli import run_folder
from snows.errors import UsageError
from snows.result import Step

# Flags that have no bearing on a run's result, and are what each command says.
NO_SETTINGS = {"argv", "run", "resumes", "changed", "resume", "out_dir", "data_dir", "verbose", "quiet"}
NO_SETTINGS |= {"evaluate_layers", "export_masks"}
# Flags that may change when a run goes on, since its problem stays the same; and what that means for the result.
MEANINGS = ROUNDING, LEFT_OUT = ("the last bits of the result may differ", "those steps are left out")
MAY_CHANGE = {"batch_size": ROUNDING, "memory_budget": ROUNDING, "device": ROUNDING, "joint_steps": LEFT_OUT}
MAY_CHANGE |= {"precision": ROUNDING, "num_workers": None, "test_batch_size": None, "cache_dir": None}
SIZES = {"batch_size", "memory_budget", "device"}  # those that decide how many images are in a micro-batch


def resumed(flags: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags that the run of --resume began with, and those that commands have changed since, `args` the last.

    Raises:
        UsageError: --resume names no run of this script, or other flags contradict it.
    """
    folder = args.resume
    if folder.is_dir() and not (folder / "args.json").exists() and run_folder.is_free(folder):
        raise UsageError(f"{folder} was ended before its run had begun: give its first command again.")
    saved = run_folder.read_json(folder / "args.json", "script", "argv", "algo", "seed")
    if saved["script"] != script():
        raise UsageError(f"{folder} was begun by {saved['script']}: resume it with that.")
    began = flags.parse_args(saved["argv"])
    vars(began).update((name, saved[name]) for name in MAY_CHANGE if name in saved)  # as the last command left them
    now = flags.parse_args(args.argv, copy.copy(began))
    now.argv, now.resumes, now.run = saved["argv"], saved.get("resumes", []), (saved["algo"], saved["seed"])
    before, after = {**settings(began), **saved, "algo": began.algo, "seed": began.seed}, settings(now)
    now.changed = {name: (before[name], after[name]) for name in after if before[name] != after[name]}
    refused = [name for name in now.changed if not may_change(name, now)]
    if refused:
        raise UsageError(f"{folder} has other settings: {differences(now, refused)}. Leave those flags out.")
    return now


def may_change(name: str, args: argparse.Namespace) -> bool:
    """Whether a run may go on with another value of a flag: it poses the same problem to each layer."""
    if name == "batch_size" and options.from_flags(args, args.seed[0]).batching:
        return False  # where each mini-batch is a problem
    return name in MAY_CHANGE and (name != "joint_steps" or args.joint_steps == 0)


def differences(args: argparse.Namespace, names: Iterable[str]) -> str:
    """What a command changes: "--batch_size was 128, now 64"."""
    return "; ".join("--{} was {}, now {}".format(name, *args.changed[name]) for name in names)


def settings(args: argparse.Namespace) -> dict:
    """What decides the results of a command's runs, by flag, as JSON holds it."""
    chosen = {**vars(options.from_flags(args, args.seed[0])), **vars(args)}
    return json.loads(json.dumps({k: v for k, v in chosen.items() if k not in NO_SETTINGS}, default=str))


def script() -> str:
    """The script that runs, with its folder."""
    return "/".join(Path(sys.argv[0]).resolve().parts[-2:])


def resume_command(folder: Path) -> str:
    return shlex.join(["python", sys.argv[0], "--resume", str(folder)])


def note_changes(args: argparse.Namespace, finished: int) -> None:
    """Record what changes for a run that goes on behind so many steps, and say in a line what that means for it."""
    if args.changed:
        args.resumes.append({"behind": finished, **{name: now for name, (_, now) in args.changed.items()}})
    meant = {meaning: [name for name in args.changed if MAY_CHANGE[name] == meaning] for meaning in MEANINGS}
    texts = [f"{differences(args, names)}: {meaning}" for meaning, names in meant.items() if names]
    if texts:
        print(f"note: {', '.join(texts)}.", file=sys.stderr)


def earlier(args: argparse.Namespace, steps: Iterable[Step]) -> Iterator[Step]:
    """The finished steps; how many images fitted the memory is no longer known of those before a change of sizes."""
    behind = max((resume["behind"] for resume in args.resumes if SIZES & resume.keys()), default=0)
    return (replace(step, fitted=number >= behind) for number, step in enumerate(steps))


def read_metrics(folder: Path) -> dict:
    """The metrics of a run that was begun."""
    checksums = (f"{what}_checksum" for what in ("weights", "masks", "calibration"))
    return run_folder.read_json(folder / "metrics.json", "dense_accuracy", "masked_accuracy", *checksums)


def check_unchanged(folder: Path, metrics: dict, environment: dict) -> None:
    """Refuse to go on with other weights, masks or images than a run began with; warn of another machine or library.

    Raises:
        UsageError: the checkpoint, the file of masks or the dataset has changed.
    """
    before = read_metrics(folder)
    for what in ("weights", "masks", "calibration"):
        if before[f"{what}_checksum"] != metrics[f"{what}_checksum"]:
            raise UsageError(f"cannot go on with {folder}: its {what} are not what they were when the run began.")
    began = run_folder.read_json(folder / "environment.json", *environment)
    changed = [f"{k} was {began[k]}, now {v}" for k, v in environment.items() if k != "command" and began[k] != v]
    if changed:
        print(f"warning: {'; '.join(changed)}: the last bits of the result may differ.", file=sys.stderr)
