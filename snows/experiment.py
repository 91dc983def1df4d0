"""One experiment from the shell: the flags that every script shares, and the run from dense accuracy to run folder."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from snows import evaluate, memory, options, report
from snows.data import DATASETS
from snows.errors import Interrupted, SnowsError, UsageError
from snows.graph import Network
from snows.mask_files import read_masks
from snows.masks import NM, Pattern, Unstructured
from snows.pipeline import ALGORITHMS, prune, sparsity
from snows.registry import Known, load_classifier, load_data

FAR_FROM_STATED = 1.0  # percent points between measured and stated dense accuracy that call for a warning


def parser(description: str, arch: str) -> argparse.ArgumentParser:
    """The flags that every script shares; `arch` is the network that ships with the repository."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = flags.add_argument_group("network and images")
    group.add_argument("--arch", default=arch, help=f"the network (default: {arch}, which ships with SNOWS)")
    group.add_argument("--checkpoint", type=Path, help="local weights for --arch (.safetensors, .pt, .pth, .bin)")
    group.add_argument("--random_weights", action="store_true", help="no trained weights: to try speed and memory")
    group.add_argument("--num_classes", type=int, help="classes of a torchvision or timm network, if not its usual")
    group.add_argument("--mean", type=float, nargs="+", help="normalisation the network was trained with, per channel")
    group.add_argument("--std", type=float, nargs="+", help="normalisation the network was trained with, per channel")
    names = ", ".join(DATASETS)
    group.add_argument("--dset", help=f"{names}, a folder with train/ and val/, or an .npz (default: what fits --arch)")
    group.add_argument("--data_dir", type=Path, default=Path("data"), help="where datasets lie (default: data)")
    group.add_argument("--ngrads", type=int, default=1000, help="number of calibration images (default: 1000)")
    group.add_argument("--mirror", action="store_true", help="flip half of the calibration images left to right")
    group.add_argument("--test_batch_size", type=int, default=256, help="test images per batch (default: 256)")
    group.add_argument("--num_workers", type=int, default=0, help="processes that load images (default: 0)")
    group.add_argument("--masks", type=Path, help="masks of your own, or a sparse checkpoint whose zeros are the mask")
    group = flags.add_argument_group("run")
    group.add_argument("--algo", nargs="+", default=["SNOWS"], choices=ALGORITHMS, help="how to set the survivors")
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    group.add_argument("--skip_evaluation", action="store_true", help="measure no accuracies (random weights)")
    group.add_argument("--out_dir", type=Path, help="folder of the run (default: a new one under runs/)")
    options.add_flags(flags)
    return flags


def add_unstructured_flags(flags: argparse.ArgumentParser, default: float) -> None:
    group = flags.add_argument_group("pattern")
    group.add_argument(
        "--target_sparsity",
        type=float,
        default=default,
        help=f"share of all parameters to set to zero (default: {default})",
    )
    group.add_argument("--max_layer_sparsity", type=float, help="cap per layer (default: halfway from the target to 1)")
    group.add_argument("--allocation", default="global", choices=("global", "uniform"), help="sparsity of the layers")


def unstructured(args: argparse.Namespace) -> Unstructured:
    return Unstructured(args.target_sparsity, args.max_layer_sparsity, args.allocation)


def add_nm_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("pattern")
    group.add_argument("--NM_N", type=int, default=2, help="weights kept of every M (default: 2)")
    group.add_argument("--NM_M", type=int, default=4, help="consecutive inputs in a group (default: 4)")


def nm(args: argparse.Namespace) -> NM:
    return NM(args.NM_N, args.NM_M)


def check_device(name: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: torch does not know it or cannot use it.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from error


Layers = Callable[[str], bool]  # whether to prune a layer, by its name


def run(args: argparse.Namespace, known: Known, pattern: Pattern, layers: Layers = lambda name: True) -> list[dict]:
    """Prune one network with one pattern, once for each --algo and --seed; returns the metrics of each run."""
    return Experiment(args, known, pattern, layers).run()


class Experiment:
    """What the runs of one command share: the dense network, its images, its masks, and their accuracies."""

    def __init__(self, args: argparse.Namespace, known: Known, pattern: Pattern, layers: Layers):
        check_device(args.device)
        classifier = load_classifier(args, known)
        self.args, self.model, self.pattern, self.layers = args, classifier.model, pattern, layers
        self.data = load_data(args, classifier)
        dense_accuracy = self.accuracy(self.model)
        self.name = str(pattern) if args.masks is None else f"masks {args.masks.stem}"
        print(f"{args.arch} on {args.dset}: dense accuracy {report.percent(dense_accuracy)}, pattern {self.name}")
        warn_if_far(dense_accuracy, classifier.stated_accuracy)
        if args.masks is not None:
            masks = read_masks(args.masks, Network(self.model).layers, pattern)
            self.pattern = {name: mask for name, mask in masks.items() if layers(name)}
        self.masked = prune(self.model, None, self.pattern, algo="MP", layers=layers, device=args.device)
        print(f"pruning {len(self.masked.masks)} layers: {report.kinds(self.masked.masks)}", flush=True)
        self.common = {
            "arch": args.arch,
            "dset": str(args.dset),
            "pattern": self.name,
            "dense_accuracy": dense_accuracy,
            "dense_sparsity": sparsity(self.model),
            "masked_accuracy": self.accuracy(self.masked.model),
            "left_dense": self.masked.left_dense,
        }

    def accuracy(self, model: nn.Module) -> float | None:
        """Percent of the test images; None with --skip_evaluation."""
        if self.args.skip_evaluation:
            return None
        return evaluate.accuracy(model, self.data.test_batches(self.args.test_batch_size), self.args.device)

    def run(self) -> list[dict]:
        """Every --algo with every --seed, each into a folder of its own."""
        runs = list(itertools.product(self.args.algo, self.args.seed))
        return [self.once(algo, seed, self.folder(algo, seed, alone=len(runs) == 1)) for algo, seed in runs]

    def folder(self, algo: str, seed: int, alone: bool) -> Path:
        """A new folder for one run: --out_dir itself, or below it where there are several."""
        chosen = self.args.out_dir
        if chosen is not None and not alone:
            chosen = chosen / f"{algo}-seed{seed}"
        pattern = re.sub(r"[^\w]+", "-", self.name)
        return report.new_folder(chosen, f"{Path(self.args.arch).name}-{pattern}-{algo}-seed{seed}")

    def once(self, algo: str, seed: int, folder: Path) -> dict:
        """One run: prune, evaluate, save, print; returns its metrics."""
        args, chosen = self.args, options.from_flags(self.args, seed)
        images, indices = (None, []) if algo == "MP" else self.data.calibration(args.ngrads, seed, args.mirror)
        report.write_json(folder / "args.json", {**vars(args), "algo": algo, "seed": seed, "options": vars(chosen)})
        report.write_json(folder / "environment.json", report.environment(args.device))
        report.write_json(folder / "calibration.json", {"indices": indices})
        settings = {**self.common, "algo": algo, "seed": seed, "options": vars(chosen)}
        progress = report.Progress(f"{algo} {self.name}, seed {seed}")
        try:
            pruned = prune(
                self.model,
                images,
                self.pattern,
                chosen,
                algo=algo,
                layers=self.layers,
                device=args.device,
                on_layer=progress,
            )
        except Interrupted as stopped:
            report.save(folder, stopped.result, {**settings, "finished": False})
            raise SnowsError(f"{stopped}: those are saved in {folder}, the other layers are still dense.") from None
        finally:
            progress.close()
        metrics = {
            **settings,
            "accuracy": self.accuracy(pruned.model),
            "seconds": pruned.seconds,
            "curvature_products": pruned.curvature_products,
            "cg_iterations": sum(layer.cg_iterations for layer in pruned.layers),
            "peak_memory_bytes": pruned.peak_memory_bytes,
            "calibration_images": len(indices),
            "test_images": len(self.data.test),
            "finished": True,
        }
        metrics = report.save(folder, pruned, metrics)
        print(report.summary(metrics) + f"\n  saved in {folder}", flush=True)
        return metrics


def warn_if_far(measured: float | None, stated: float | None) -> None:
    """Warn where the dense accuracy is not what the weights are known for."""
    if None not in (stated, measured) and measured < stated - FAR_FROM_STATED:
        print(
            f"warning: these weights are stated to reach {stated:.2f} %, far above the {measured:.2f} % measured here. "
            f"The usual cause is a wrong normalisation (--mean, --std) or another test set.",
            file=sys.stderr,
        )


def shell(main: Callable[[], object]) -> None:
    """Run a script's main: an error that the user can mend ends in one line; 2 is wrong usage, 130 is Ctrl-C."""
    memory.keep_freed_memory()
    try:
        main()
    except SnowsError as error:
        stopped = isinstance(error.__context__, Interrupted)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(130 if stopped else 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("interrupted: nothing was solved yet", file=sys.stderr)
        sys.exit(130)
