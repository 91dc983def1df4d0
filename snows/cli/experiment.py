"""One experiment from the shell, from the dense accuracy to the run folder."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from snows import options
from snows.arguments import check_device
from snows.cli import console as screen
from snows.cli import run_folder
from snows.cli.flags import check_mask_flags
from snows.cli.journal import Journal, checksum
from snows.cli.report import write_report
from snows.cli.resume import check_unchanged, earlier, note_changes, read_metrics, resume_command, script, settings
from snows.cli.shell import ignore_signals, own_stops
from snows.errors import Interrupted, SnowsError, Unfinished, UsageError, WriteError, first_line
from snows.job import Job
from snows.masks.files import check_pattern, read_masks
from snows.masks.patterns import NM, Pattern
from snows.masks.permute import permute
from snows.masks.rules import check_patterns
from snows.memory import is_out_of_memory
from snows.methods import METHODS
from snows.modes import make_deterministic
from snows.network.layers import Network
from snows.pipeline import prune
from snows.result import Pruned, Step, sparsity
from snows.zoo import evaluate
from snows.zoo.registry import Known, load_classifier, load_data

Layers = Callable[[str], bool]  # whether to prune a layer, by its name
FAR_FROM_STATED = 1.0  # percent points between measured and stated dense accuracy that call for a warning


def permuted(model: nn.Module, pattern: NM, layers: Callable[[str], bool]) -> nn.Module:
    """The same function with input channels in a better order; says what that is worth."""
    result = permute(model, pattern, layers)
    if not result.kept:
        print("permuted nothing: the channels of every layer are tied to those of others, or cannot be followed")
        return model
    before, after = (sum(shares) / len(shares) for shares in zip(*result.kept.values()))
    print(
        f"permuted the inputs of {len(result.kept)} layers: {pattern} keeps {after:.1%} of their magnitude, not "
        f"{before:.1%}; the others' channels are tied to those of other layers, or cannot be followed"
    )
    return result.model


def run(args: argparse.Namespace, known: Known, pattern: Pattern, layers: Layers = lambda name: True) -> list[dict]:
    """Prune one network with one pattern, once for each --algo and --seed; returns the metrics of each run."""
    if args.resume is not None:
        metrics = run_folder.read_json(args.resume / "metrics.json", "finished")
        if metrics["finished"]:
            with run_folder.locked(args.resume):
                export_masks(args, args.resume)
                conclude(args.resume)
            print(f"{args.resume} is finished already.")
            return [metrics]
    return Experiment(args, known, pattern, layers).run()


class Experiment:
    """What the runs of one command share: the dense network, its images, its masks, and their accuracies."""

    def __init__(self, args: argparse.Namespace, known: Known, pattern: Pattern, layers: Layers):
        check_device(args.device)
        if args.deterministic:
            make_deterministic()
        check_mask_flags(args)
        if args.out_dir is not None and args.resume is None and len(args.algo) * len(args.seed) == 1:
            run_folder.check_free(args.out_dir)
        self.args, self.layers, self.settings = args, layers, settings(args)
        classifier = load_classifier(args, known)
        self.model = classifier.model
        self.data = load_data(args, classifier)
        if {args.mask_alg, *args.algo} != {"MP"}:
            self.data.check_enough(args.ngrads)
        self.name = str(pattern) if args.mask_alg == "MP" else f"{pattern} by {args.mask_alg}"
        self.pattern = pattern
        if args.skip:
            check_patterns(args.skip, [layer.name for layer in Network(self.model).layers], "--skip")
            self.layers = lambda name: layers(name) and not any(fnmatchcase(name, skipped) for skipped in args.skip)
        if isinstance(pattern, NM) and args.permute:
            self.model = permuted(self.model, pattern, self.layers)
        if args.masks is not None:
            self.name = f"masks {args.masks.stem}"
            masks = read_masks(args.masks, Network(self.model))
            self.pattern = {name: mask for name, mask in masks.items() if self.layers(name)}
            if isinstance(pattern, NM):
                check_pattern(args.masks, self.pattern, pattern)
        measured = {} if args.resume is None else read_metrics(args.resume)
        self.masked_accuracies = {}  # by the seed of the images that the masks were chosen with, None without images
        self.common = self.measure(measured, classifier.stated_accuracy)

    def measure(self, measured: dict, stated_accuracy: float | None) -> dict:
        """Accuracies of the dense and of the masked network, unless `measured` holds them, and what is pruned."""
        args = self.args
        seed = args.seed[0] if args.resume is None else args.run[1]
        dense = measured["dense_accuracy"] if measured else self.accuracy(self.model)
        print(f"{args.arch} on {args.dset}: dense accuracy {screen.percent(dense)}, pattern {self.name}")
        warn_if_far(dense, stated_accuracy)
        masked = self.masked(seed)
        print(f"pruning {len(masked.masks)} layers: {screen.kinds(masked.masks)}", flush=True)
        if measured:
            self.masked_accuracies[None if args.mask_alg == "MP" else seed] = measured["masked_accuracy"]
        self.masked_accuracy(seed, masked)
        return {
            "arch": args.arch,
            "dset": str(args.dset),
            "pattern": self.name,
            "weights_checksum": checksum(self.model.state_dict().values()),
            "masks_checksum": checksum([] if args.masks is None else self.pattern.values()),
            "dense_accuracy": dense,
            "dense_sparsity": sparsity(self.model),
            "left_dense": masked.left_dense,
        }

    def masked(self, seed: int) -> Pruned:
        """The network with its masks, as that seed's images choose them, and nothing solved."""
        args, chosen = self.args, options.from_flags(self.args, seed)
        images = None if args.mask_alg == "MP" else self.calibration(seed)[0]
        return prune(
            *(self.model, images, self.pattern, chosen),
            mask_alg=args.mask_alg,
            algo="MP",
            layers=self.layers,
            device=args.device,
        )

    def calibration(self, seed: int) -> tuple[torch.Tensor, list[int]]:
        """The images that a seed draws, and their indices."""
        args = self.args
        return self.data.calibration(args.ngrads, seed, args.mirror, options.from_flags(args, seed).cache_dir)

    def masked_accuracy(self, seed: int, masked: Pruned | None = None) -> float | None:
        """Percent of the masked network, measured once for each set of masks."""
        key = None if self.args.mask_alg == "MP" else seed
        if key not in self.masked_accuracies:
            self.masked_accuracies[key] = self.accuracy((masked or self.masked(seed)).model)
        return self.masked_accuracies[key]

    def accuracy(self, model: nn.Module) -> float | None:
        """Percent of the test images; None with --skip_evaluation."""
        if self.args.skip_evaluation:
            return None
        return evaluate.accuracy(model, self.data.test_batches(self.args.test_batch_size), self.args.device)

    def run(self) -> list[dict]:
        """Every --algo with every --seed, each into a folder of its own; or the one run that goes on."""
        if self.args.resume is not None:
            return [self.once(*self.args.run, self.args.resume)]
        runs = list(itertools.product(dict.fromkeys(self.args.algo), dict.fromkeys(self.args.seed)))
        folders = [self.folder(algo, seed, alone=len(runs) == 1) for algo, seed in runs]
        return [self.once(algo, seed, folder) for (algo, seed), folder in zip(runs, folders)]

    def folder(self, algo: str, seed: int, alone: bool) -> Path:
        """A new folder for one run: --out_dir itself, or below it where there are several."""
        chosen = self.args.out_dir
        if chosen is not None and not alone:
            chosen = chosen / f"{algo}-seed{seed}"
        pattern = re.sub(r"[^\w]+", "-", self.name)
        return run_folder.new_folder(chosen, f"{Path(self.args.arch).name}-{pattern}-{algo}-seed{seed}")

    def once(self, algo: str, seed: int, folder: Path) -> dict:
        """One run: prune, evaluate, save, print; returns its metrics."""
        with run_folder.locked(folder):
            if self.args.resume is None:
                run_folder.clear_begun(folder)
            metrics, images = self.begin(algo, seed, folder)
            try:
                with own_stops():
                    pruned = self.prune(algo, seed, folder, images)
                    metrics |= {"accuracy": self.accuracy(pruned.model), "finished": True}
                    metrics = run_folder.save(folder, pruned, metrics)
                    export_masks(self.args, folder)
                    print(screen.summary(metrics, folder), flush=True)
                    conclude(folder)
            except WriteError as full:
                raise SnowsError(f"{full} Make room, then go on: {resume_command(folder)}") from full
            except SnowsError as stopped:
                if stopped.result is None or isinstance(stopped, UsageError):
                    raise
                ignore_signals()
                saved = save_stopped(folder, stopped.result, metrics)
                stopped.args = (f"{str(stopped).rstrip('.')}. {saved} Go on: {resume_command(folder)}",)
                raise
            except KeyboardInterrupt as stop:
                raise Interrupted(f"interrupted. Go on: {resume_command(folder)}", stop) from None
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                command = f"{resume_command(folder)} --batch_size N"
                raise SnowsError(f"out of memory: {first_line(error)}. Go on with a smaller N: {command}") from error
        return metrics

    def begin(self, algo: str, seed: int, folder: Path) -> tuple[dict, torch.Tensor | None]:
        """What is known before the first layer, written into the folder or compared with it, and the images."""
        args = self.args
        blind = algo == args.mask_alg == "MP"
        images, indices = (None, []) if blind else self.calibration(seed)
        environment = run_folder.environment(args.device)
        metrics = {
            **self.common,
            "masked_accuracy": self.masked_accuracy(seed),
            "mask_alg": args.mask_alg if args.masks is None else "Custom",
            "algo": algo,
            "seed": seed,
            "options": vars(options.from_flags(args, seed).but(**METHODS[algo].fixed)),
            "calibration_images": len(indices),
            "calibration_checksum": checksum([] if images is None else [images]),
            "test_images": len(self.data.test),
            "finished": False,
        }
        if args.resume is not None:
            check_unchanged(folder, metrics, environment)
            note_changes(args, len(Journal(folder)))
        else:
            run_folder.write_json(folder / "environment.json", environment)
            run_folder.write_json(folder / "calibration.json", {"indices": indices})
        if args.resume is None or args.changed:
            run_folder.write_json(folder / "metrics.json", metrics)
            command = {"script": script(), "argv": args.argv, "algo": algo, "seed": seed, "resumes": args.resumes}
            run_folder.write_json(folder / "args.json", {**self.settings, **command})  # the last: it makes a run of it
        return metrics, images

    def prune(self, algo: str, seed: int, folder: Path, images: torch.Tensor | None) -> Pruned:
        """Prune, keeping every finished layer in the folder and going on behind those that it holds."""
        args, journal = self.args, Journal(folder)
        style = "quiet" if args.quiet else "verbose" if args.verbose else ""
        progress = screen.Progress(f"{algo} {self.name}, seed {seed}", style, earlier=len(journal))

        def keep(step: Step, job: Job) -> None:
            if not step.replayed:
                if args.evaluate_layers:
                    step.record.accuracy = self.accuracy(job.network.model)
                journal.append(step)
            progress(step.record, job.turns)

        try:
            return prune(
                self.model,
                images,
                self.pattern,
                options.from_flags(args, seed),
                mask_alg=args.mask_alg,
                algo=algo,
                layers=self.layers,
                device=args.device,
                listener=keep,
                finished=earlier(args, journal),
            )
        except (RuntimeError, Unfinished) as error:
            if isinstance(error, Unfinished) and isinstance(error.__cause__, OSError):  # the output's, not the job's
                raise error.__cause__ from None
            if "deterministic" not in str(error):
                raise
            raise SnowsError(f"{first_line(error)} Run without --deterministic.") from error
        finally:
            progress.close()


def export_masks(args: argparse.Namespace, folder: Path) -> None:
    """Copy a finished run's masks to where --export_masks says, if it does."""
    if args.export_masks is not None:
        run_folder.write(args.export_masks, (folder / "masks.safetensors").read_bytes())


def save_stopped(folder: Path, result: Pruned, metrics: dict) -> str:
    """Save the network as far as a run came that was stopped; what there is to say of it.

    The finished layers are in the journal already: where they cannot be saved once more, nothing is lost.
    """
    try:
        run_folder.save(folder, result, metrics)
        write_report([folder], folder / "report.html")
    except Exception as error:  # no room, no memory: the run goes on all the same
        return f"The finished layers are kept, but not yet as a network ({first_line(error).rstrip('.')})."
    return f"The finished layers are saved in {folder}, the other layers are still dense."


def conclude(folder: Path) -> None:
    """What is left to do once a run's results are saved: its steps are no longer needed, and its report is drawn."""
    Journal(folder).clear()
    write_report([folder], folder / "report.html")


def warn_if_far(measured: float | None, stated: float | None) -> None:
    """Warn where the dense accuracy is not what the weights are known for."""
    if None not in (stated, measured) and measured < stated - FAR_FROM_STATED:
        print(
            f"warning: these weights are stated to reach {stated:.2f} %, far above the {measured:.2f} % measured here. "
            f"The usual cause is a wrong normalisation (--mean, --std) or another test set.",
            file=sys.stderr,
        )
