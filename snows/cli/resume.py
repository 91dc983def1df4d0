"""Going on with a run: what must be as it was when it began, and what may change since its problem stays the same."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

from snows.cli import files, run_folder
from snows.cli.settings import PatternOf, RunSettings, check_flags, from_flags
from snows.distributed import current
from snows.errors import UsageError
from snows.options import Options
from snows.result import Step
from snows.zoo.evaluate import Score

# Flags that may change when a run goes on, since its problem stays the same; and what that means for the result.
ROUNDING = "the last bits of the result may differ"
OTHERS = "what is still to be solved may come out a little otherwise, as with another seed"  # other random signs, ...
LEFT_OUT = "those steps are left out"
MEANINGS = ROUNDING, OTHERS, LEFT_OUT
SIZES = ("batch_size", "memory_budget", "device")  # those that decide how many images are in a micro-batch
MAY_CHANGE: dict[str, str | None] = dict.fromkeys(SIZES, OTHERS)
MAY_CHANGE |= {"joint_steps": LEFT_OUT, "precision": ROUNDING}
MAY_CHANGE |= dict.fromkeys(("num_workers", "test_batch_size", "cache_dir"))


def resumed(flags: argparse.ArgumentParser, folder: Path, pattern_of: PatternOf) -> RunSettings:
    """The settings that the folder's run began with, and what commands have changed of them since, this one the last.

    Raises:
        UsageError: the folder holds no run of this script, or the command's other flags contradict it.
    """
    if folder.is_dir() and not (folder / "args.json").exists() and run_folder.is_free(folder):
        raise UsageError(f"{folder} was ended before its run had begun: give its first command again.")
    saved = files.read_json(folder / "args.json", "script", "argv", "algo", "seed")
    if saved["script"] != script():
        raise UsageError(f"{folder} was begun by {saved['script']}: resume it with that.")
    began = flags.parse_args(saved["argv"])
    vars(began).update((name, saved[name]) for name in MAY_CHANGE if name in saved)  # as the last command left them
    now = flags.parse_args(sys.argv[1:], copy.copy(began))
    if now.out_dir != began.out_dir and now.out_dir.resolve() != folder.resolve():
        raise UsageError(f"--resume goes on in {folder}: leave --out_dir out.")
    alone = argparse.Namespace(**vars(now) | {"algo": [saved["algo"]], "seed": [saved["seed"]]})
    check_flags(alone)
    settings = from_flags(now, pattern_of, saved["argv"])
    before = dict(from_flags(began, pattern_of, saved["argv"]).flags)
    before |= {**saved, "algo": began.algo, "seed": began.seed}
    changed = {name: (before[name], value) for name, value in settings.flags.items() if before[name] != value}
    settings = replace(
        settings,
        changed=MappingProxyType(changed),
        algo=(saved["algo"],),
        seed=(saved["seed"],),
        resumes=tuple(saved.get("resumes", ())),
    )
    refused = [name for name in changed if not may_change(name, settings.options)]
    if refused:
        raise UsageError(f"{folder} has other settings: {differences(changed, refused)}. Leave those flags out.")
    return settings


def may_change(name: str, options: Options) -> bool:
    """Whether a run may go on with another value of a flag: it poses the same problem to each layer."""
    if name == "batch_size" and (options.batching or options.mixtures):
        return False  # where each mini-batch is a problem, or has mixtures of its own images
    if name == "joint_steps":
        return options.joint_steps == 0 and not options.joint_stages  # the last ones, not those on the way
    return name in MAY_CHANGE


def differences(changed: Mapping[str, tuple], names: Iterable[str]) -> str:
    """What a command changes: "--batch_size was 128, now 64"."""
    return "; ".join("--{} was {}, now {}".format(name, *changed[name]) for name in names)


def script() -> str:
    """The script that runs, with its folder."""
    return "/".join(Path(sys.argv[0]).resolve().parts[-2:])


def resume_command(folder: Path) -> str:
    group = current()
    launcher = [sys.executable] if group.size == 1 else ["torchrun", "--nproc_per_node", str(group.neighbours)]
    return shlex.join([*launcher, sys.argv[0], "--resume", str(folder)])


def note_changes(changed: Mapping[str, tuple]) -> None:
    """Say in a line what a command's changes mean for the result, if anything."""
    meant = {meaning: [name for name in changed if MAY_CHANGE[name] == meaning] for meaning in MEANINGS}
    texts = [f"{differences(changed, names)}: {meaning}" for meaning, names in meant.items() if names]
    if texts:
        print(f"note: {', '.join(texts)}.", file=sys.stderr)


def changes(settings: RunSettings, finished: int) -> list[dict]:
    """What each command with --resume changed, and after how many finished steps; this one's, if any, is the last."""
    if not settings.changed:
        return list(settings.resumes)
    return [*settings.resumes, {"after": finished, **{name: now for name, (_, now) in settings.changed.items()}}]


def earlier(resumes: Iterable[dict], steps: Iterable[Step]) -> Iterator[Step]:
    """The finished steps; how many images fitted the memory is no longer known of those before a change of sizes."""
    sizes_changed = [resume for resume in resumes if resume.keys() & set(SIZES)]
    after = max((resume["after"] for resume in sizes_changed), default=0)
    return (replace(step, fitted=number >= after) for number, step in enumerate(steps))


def read_metrics(folder: Path) -> dict:
    """The metrics of a run that was begun."""
    checksums = (f"{what}_checksum" for what in ("weights", "masks", "calibration"))
    masked = (f"masked_{each.name}" for each in fields(Score))
    return files.read_json(folder / "metrics.json", "dense_accuracy", *masked, *checksums)


def check_unchanged(folder: Path, metrics: dict, environment: dict) -> None:
    """Refuse to go on with other weights, masks or images than a run began with; warn of another machine or library.

    Raises:
        UsageError: the checkpoint, the file of masks or the dataset has changed.
    """
    before = read_metrics(folder)
    for what in ("weights", "masks", "calibration"):
        if before[f"{what}_checksum"] != metrics[f"{what}_checksum"]:
            raise UsageError(f"cannot go on with {folder}: its {what} are not what they were when the run began.")
    known = files.read_json(folder / "environment.json", *(environment.keys() - {"processes"}))
    began = {"processes": 1, **known}
    changed = [f"{k} was {began[k]}, now {v}" for k, v in environment.items() if k != "command" and began[k] != v]
    if changed:
        print(f"warning: {'; '.join(changed)}: the last bits of the result may differ.", file=sys.stderr)
