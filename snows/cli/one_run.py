"""One run: one algorithm with one seed, into a folder of its own, from which it can go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from snows.checksum import checksum
from snows.cli import console, files, run_folder
from snows.cli.environment import environment_of
from snows.cli.journal import Journal
from snows.cli.report import write_report
from snows.cli.resume import changes, check_unchanged, earlier, note_changes, resume_command, script
from snows.cli.shell import ignore_signals, own_stops
from snows.cli.task import Task
from snows.errors import Interrupted, SnowsError, Unfinished, UsageError, WriteError, first_line
from snows.job import Job
from snows.memory import is_out_of_memory
from snows.methods import METHODS
from snows.result import Pruned, Step
from snows.verdicts import Lost

WORSE = 1.0  # percent of the test images on which a network may agree less than its masks alone, by chance


class OneRun:
    """A task, solved by one algorithm with one seed."""

    def __init__(self, task: Task, algo: str, seed: int, folder: Path):
        self.task, self.settings, self.algo, self.seed, self.folder = task, task.settings, algo, seed, folder
        self.journal = Journal(folder)
        self.judged: tuple[int, float | None] = (-1, None)  # the sweep whose joint steps were measured last

    def carry_out(self) -> dict:
        """Prune, evaluate, save, print; returns the run's metrics."""
        if self.task.group.rank > 0:
            return self.follow()
        with run_folder.locked(self.folder):
            if self.settings.resume is None:
                run_folder.clear_begun(self.folder)
            images, indices = self.draw()
            metrics = self.first_metrics(images)
            resumes = changes(self.settings, finished=len(self.journal))
            self.begin(metrics, indices, resumes)
            with telling_how_to_go_on(self.folder, metrics, self.task.macs):
                pruned = self.prune(images, resumes)
                metrics |= {**vars(self.task.score(pruned.model)), "finished": True}
                metrics = run_folder.save(self.folder, pruned, metrics, self.task.macs)
                export_masks(self.settings.export_masks, self.folder)
                warn_if_worse(metrics)
                print(console.summary(metrics, self.folder), flush=True)
                conclude(self.folder)
        return metrics

    def follow(self) -> dict:
        """What a process does that is not the first: its share of the images, and nothing of the folder."""
        images, _ = self.draw()
        self.task.masked_score(self.seed)
        with telling_how_to_go_on(self.folder, None):
            pruned = self.task.prune(self.algo, self.seed, images, listener=self.judge)
            self.task.score(pruned.model)
        return {}

    def judge(self, step: Step, job: Job) -> None:
        """Measure the network as it stands after a layer, if that is asked for."""
        if not self.settings.evaluate_layers or step.replayed:
            return
        record = step.record
        if not record.joint or record.sweep != self.judged[0]:  # of joint steps, all layers have been written
            self.judged = record.sweep, self.task.score(job.network.model).accuracy
        record.accuracy = self.judged[1]

    def draw(self) -> tuple[Tensor | None, list[int]]:
        """The calibration images and their indices, if the run looks at any."""
        return self.task.calibration(self.seed) if self.settings.needs_images(self.algo) else (None, [])

    def first_metrics(self, images: Tensor | None) -> dict:
        """What is known of the run before its first layer."""
        settings = self.settings
        return {
            **self.task.common,
            **{f"masked_{name}": value for name, value in vars(self.task.masked_score(self.seed)).items()},
            "mask_alg": settings.mask_alg if settings.masks is None else "Custom",
            "algo": self.algo,
            "seed": self.seed,
            "options": vars(METHODS[self.algo].settle(settings.options_of(self.seed))),
            "calibration_images": 0 if images is None else len(images),
            "calibration_checksum": checksum([] if images is None else [images]),
            "test_images": len(self.task.data.test),
            "finished": False,
        }

    def begin(self, metrics: dict, indices: list[int], resumes: list[dict]) -> None:
        """Write what is known before the first layer into the folder, or compare it with what the run began with.

        Raises:
            UsageError: it began with other weights, masks or images.
        """
        settings, environment = self.settings, environment_of(self.settings.device)
        if settings.resume is not None:
            check_unchanged(self.folder, metrics, environment)
            note_changes(settings.changed)
        else:
            files.write_json(self.folder / "environment.json", environment)
            files.write_json(self.folder / "calibration.json", {"indices": indices})
        if settings.resume is None or settings.changed:
            files.write_json(self.folder / "metrics.json", metrics)
            command = {"script": script(), "argv": settings.argv, "algo": self.algo, "seed": self.seed}
            arguments = {**settings.flags, **command, "resumes": resumes}
            files.write_json(self.folder / "args.json", arguments)  # the last: it makes a run of the folder

    def prune(self, images: Tensor | None, resumes: list[dict]) -> Pruned:
        """Prune, keeping every finished layer in the folder and going on after those that it holds."""
        title = f"{self.algo} {self.task.name}, seed {self.seed}"
        progress = console.Progress(title, self.settings.style, earlier=len(self.journal))

        def keep(step: Step, job: Job) -> None:
            self.judge(step, job)
            if step.replayed:
                self.journal.pass_over()
            else:
                self.journal.append(step)
            progress(step.record, job.turns)

        finished = earlier(resumes, self.journal)
        try:
            return self.task.prune(self.algo, self.seed, images, listener=keep, finished=finished)
        except (RuntimeError, Unfinished) as error:
            if isinstance(error, Unfinished) and isinstance(error.__cause__, OSError):  # the output's, not the job's
                raise error.__cause__ from None
            if "deterministic" not in str(error):
                raise
            raise SnowsError(f"{first_line(error)} Run without --deterministic.") from error
        finally:
            progress.close()


def warn_if_worse(metrics: dict) -> None:
    """Warn where the network agrees less with the dense one than the masks alone leave it."""
    solved, masked = metrics["agreement"], metrics["masked_agreement"]
    if None not in (solved, masked) and solved < masked - WORSE:
        print(
            f"warning: the network agrees with the dense one on {solved:.1f} % of the test images, and with the masks "
            f"alone on {masked:.1f} %: {metrics['calibration_images']} calibration images are too few for it, or "
            f"unlike those that test (--ngrads, --min_samples).",
            file=sys.stderr,
        )


@contextmanager
def telling_how_to_go_on(folder: Path, metrics: dict | None, macs: dict[str, int] | None = None) -> Iterator[None]:
    """Whatever stops a run: the finished layers are saved, and the error says with which command the run goes on.

    metrics, macs: what is saved besides; None: by another process.
    """
    command = resume_command(folder)
    try:
        with own_stops():
            yield
    except WriteError as full:
        raise SnowsError(f"{full} Make room, then go on: {command}") from full
    except SnowsError as stopped:
        if (stopped.result is None and not isinstance(stopped, Lost)) or isinstance(stopped, UsageError):
            raise
        ignore_signals()
        saved = "What is finished is kept."
        if metrics is not None and stopped.result is not None:
            saved = save_stopped(folder, stopped.result, metrics, macs)
        stopped.args = (f"{str(stopped).rstrip('.')}. {saved} Go on: {command}",)
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted. Go on: {command}", stop) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"Go on with a smaller N: {command} --batch_size N"
        raise SnowsError(f"out of memory: {first_line(error)}. {advice}") from error


def export_masks(file: Path | None, folder: Path) -> None:
    """Copy a finished run's masks to a file, if one is named."""
    if file is not None:
        files.write(file, (folder / "masks.safetensors").read_bytes())


def save_stopped(folder: Path, result: Pruned, metrics: dict, macs: dict[str, int] | None = None) -> str:
    """Save the network as far as a run came that was stopped; what there is to say of it.

    The finished layers are in the journal already: where they cannot be saved once more, nothing is lost.
    """
    try:
        run_folder.save(folder, result, metrics, macs)
        write_report([folder], folder / "report.html")
    except Exception as error:  # no room, no memory: the run goes on all the same
        return f"The finished layers are kept, but not yet as a network ({first_line(error).rstrip('.')})."
    return f"The finished layers are saved in {folder}, the other layers are still dense."


def conclude(folder: Path) -> None:
    """What is left to do once a run's results are saved: its steps are no longer needed, and its report is drawn."""
    Journal(folder).clear()
    write_report([folder], folder / "report.html")
