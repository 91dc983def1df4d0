"""One experiment from the shell: a network pruned by each --algo with each --seed, each run into its own folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from snows.cli import files, launch, run_folder
from snows.cli.exporting import export_run
from snows.cli.one_run import OneRun, conclude, export_masks
from snows.cli.resume import resume_command, script
from snows.cli.settings import RunSettings
from snows.cli.task import Layers, Task
from snows.deploy.exports import EXPORTS, check_exports
from snows.distributed import Group
from snows.errors import UsageError
from snows.modes import make_deterministic
from snows.network.checks import check_device
from snows.zoo.registry import Known


def run(
    settings: RunSettings, known: Known, layers: Layers = lambda name: True, named: Mapping[str, Sequence[str]] = {}
) -> list[dict]:
    """Carry out every run of a command, or the one that goes on; returns the metrics of each.

    known: networks by name, besides those of libraries. layers: which layers to prune, by name.
    named: a flag -> its names and patterns, each of which must name a layer.

    Of several processes that torchrun or SLURM has started, the first writes, says and returns all there is.
    """
    check_exports(settings.export, settings.how)
    settings = replace(settings, device=launch.own_device(settings.device))
    with launch.joined(settings.device) as group:
        done = carry_out(settings, known, layers, named, group)
    for folder in done:
        exported(folder, settings, known)
    return list(done.values())


def carry_out(
    settings: RunSettings, known: Known, layers: Layers, named: Mapping[str, Sequence[str]], group: Group
) -> dict[Path, dict]:
    """The runs of a command, in each of its processes: the metrics by folder, which are the first one's to return."""
    if settings.resume is not None:
        metrics = files.read_json(settings.resume / "metrics.json", "finished")
        if metrics["finished"]:
            return {settings.resume: finish_again(settings.resume, settings, metrics)} if group.rank == 0 else {}
    check_device(settings.device)
    if settings.deterministic:
        make_deterministic()
    done, runs = dict[Path, dict](), settings.runs
    if settings.resume is None and settings.out_dir is not None:  # before the network is loaded and measured
        places = folders_of(settings, settings.out_dir)
        done = group.agree(ended_before(places, settings) if group.rank == 0 else {})
        runs = [run for run in runs if places[run] not in done]
    if not runs:
        return done if group.rank == 0 else {}
    task = Task(settings, known, layers, named)
    for name in settings.export:
        EXPORTS[name].check_network(task.model)
    if settings.resume is not None:
        folders = [settings.resume]
    else:
        made = (new_folder(task, algo, seed) if group.rank == 0 else None for algo, seed in runs)
        folders = [folder for folder in map(group.agree, made) if folder is not None]
    for (algo, seed), folder in zip(runs, folders):
        done[folder] = OneRun(task, algo, seed, folder).carry_out()
    return done if group.rank == 0 else {}


def exported(folder: Path, settings: RunSettings, known: Known) -> None:
    """Make the files of --export of a finished run, if there are any."""
    if settings.export:
        with run_folder.locked(folder):
            export_run(folder, settings.export, settings.how, known, settings.data_dir)


def finish_again(folder: Path, settings: RunSettings, metrics: dict) -> dict:
    """What is left of a run whose results are saved: its report, and the masks that are asked for."""
    with run_folder.locked(folder):
        export_masks(settings.export_masks, folder)
        conclude(folder)
    print(f"{folder} is finished already.")
    return metrics


def folders_of(settings: RunSettings, out_dir: Path) -> dict[tuple[str, int], Path]:
    """The folder of each run, (algorithm, seed): --out_dir itself, or below it where there are several."""
    alone = len(settings.runs) == 1
    return {(algo, seed): out_dir if alone else out_dir / f"{algo}-seed{seed}" for algo, seed in settings.runs}


def new_folder(task: Task, algo: str, seed: int) -> Path:
    """A new folder for one run."""
    settings, pattern = task.settings, re.sub(r"[^\w]+", "-", task.name)
    chosen = None if settings.out_dir is None else folders_of(settings, settings.out_dir)[algo, seed]
    return run_folder.new_folder(chosen, f"{Path(settings.arch).name}-{pattern}-{algo}-seed{seed}")


def ended_before(folders: dict[tuple[str, int], Path], settings: RunSettings) -> dict[Path, dict]:
    """The runs of the same command that have ended in their folders already, with their metrics, where it has several.

    Raises:
        UsageError: a folder holds something else, or a run that is to be gone on with first.
    """
    done = {}
    for (algo, seed), folder in folders.items():
        if len(folders) == 1 or not (folder / "args.json").exists():
            run_folder.check_free(folder)
            continue
        saved = files.read_json(folder / "args.json", "script", "argv", "algo", "seed")
        own = {**settings.flags, "script": script(), "algo": algo, "seed": seed}
        if any(saved.get(name) != value for name, value in own.items()):
            raise UsageError(f"{folder} holds a run of another command: choose another --out_dir.")
        metrics = files.read_json(folder / "metrics.json", "finished")
        if not metrics["finished"]:
            raise UsageError(f"{folder} holds a run that was stopped: go on with it first: {resume_command(folder)}")
        print(f"{folder} is finished already.")
        done[folder] = metrics
    return done
