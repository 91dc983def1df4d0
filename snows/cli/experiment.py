"""One experiment from the shell: a network pruned by each --algo with each --seed, each run into its own folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from snows.cli import launch, run_folder
from snows.cli.exporting import export_run
from snows.cli.one_run import OneRun, conclude, export_masks
from snows.cli.settings import RunSettings
from snows.cli.task import Layers, Task
from snows.deploy.exports import check_exports
from snows.deploy.timm_folder import check_network
from snows.distributed import Group
from snows.modes import make_deterministic
from snows.network.checks import check_device
from snows.zoo.registry import Known


def run(settings: RunSettings, known: Known, layers: Layers = lambda name: True) -> list[dict]:
    """Carry out every run of a command, or the one that goes on; returns the metrics of each.

    known: networks by name, besides torchvision's and timm's. layers: which layers to prune, by name.

    Of several processes that torchrun or SLURM has started, the first writes, says and returns all there is.
    """
    check_exports(settings.export, settings.how)
    settings = replace(settings, device=launch.own_device(settings.device))
    with launch.joined(settings.device) as group:
        done = carry_out(settings, known, layers, group)
    for folder in done:
        exported(folder, settings, known)
    return list(done.values())


def carry_out(settings: RunSettings, known: Known, layers: Layers, group: Group) -> dict[Path, dict]:
    """The runs of a command, in each of its processes: the metrics by folder, which are the first one's to return."""
    if settings.resume is not None:
        metrics = run_folder.read_json(settings.resume / "metrics.json", "finished")
        if metrics["finished"]:
            return {settings.resume: finish_again(settings.resume, settings, metrics)} if group.rank == 0 else {}
    check_device(settings.device)
    if settings.deterministic:
        make_deterministic()
    alone = len(settings.runs) == 1
    if settings.resume is None and settings.out_dir is not None and alone and group.rank == 0:
        run_folder.check_free(settings.out_dir)  # before the network is loaded and measured
    task = Task(settings, known, layers)
    if "timm" in settings.export:
        check_network(task.model)
    if settings.resume is not None:
        folders = [settings.resume]
    else:
        made = (new_folder(task, algo, seed, alone) if group.rank == 0 else None for algo, seed in settings.runs)
        folders = [folder for folder in map(group.agree, made) if folder is not None]
    runs = [OneRun(task, algo, seed, folder) for (algo, seed), folder in zip(settings.runs, folders)]
    done = {run.folder: run.carry_out() for run in runs}
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


def new_folder(task: Task, algo: str, seed: int, alone: bool) -> Path:
    """A new folder for one run: --out_dir itself, or below it where there are several."""
    settings, pattern = task.settings, re.sub(r"[^\w]+", "-", task.name)
    chosen = settings.out_dir
    if chosen is not None and not alone:
        chosen = chosen / f"{algo}-seed{seed}"
    return run_folder.new_folder(chosen, f"{Path(settings.arch).name}-{pattern}-{algo}-seed{seed}")
