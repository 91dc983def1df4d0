"""One experiment from the shell: the flags that every script shares, and the run from dense accuracy to run folder."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from snows import evaluate, options, report
from snows.classifier import Classifier
from snows.data import DATASETS, Data
from snows.errors import Interrupted, SnowsError, UsageError
from snows.masks import Pattern
from snows.pipeline import ALGORITHMS, prune, sparsity

FAR_FROM_STATED = 1.0  # percent points between measured and stated dense accuracy that call for a warning


def parser(description: str, arch: str) -> argparse.ArgumentParser:
    """The flags that every script shares; `arch` is the network that ships with the repository."""
    flags = argparse.ArgumentParser(description=description)
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
    group.add_argument("--test_batch_size", type=int, default=256, help="test images per batch (default: 256)")
    group.add_argument("--num_workers", type=int, default=0, help="processes that load images (default: 0)")
    group = flags.add_argument_group("run")
    group.add_argument("--algo", nargs="+", default=["SNOWS"], choices=ALGORITHMS, help="how to set the survivors")
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    group.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    group.add_argument("--out_dir", type=Path, help="folder of the run (default: a new one under runs/)")
    options.add_flags(flags)
    return flags


def run(args: argparse.Namespace, classifier: Classifier, data: Data, pattern: Pattern) -> list[dict]:
    """Prune one network with one pattern, once for each --algo and --seed; returns the metrics of each run."""
    model, device = classifier.model, args.device
    test = data.test_batches(args.test_batch_size)
    dense_accuracy = evaluate.accuracy(model, test, device)
    print(f"{args.arch} on {args.dset}: dense accuracy {dense_accuracy:.2f} %, pattern {pattern}, device {device}")
    warn_if_far(dense_accuracy, classifier.stated_accuracy)
    masked = prune(model, None, pattern, algo="MP", device=device)
    common = {
        "dense_accuracy": dense_accuracy,
        "dense_sparsity": sparsity(model),
        "masked_accuracy": evaluate.accuracy(masked.model, test, device),
    }
    runs = list(itertools.product(args.algo, args.seed))
    records = []
    for algo, seed in runs:
        name = (
            f"{Path(args.arch).name}-{pattern}-{algo}-seed{seed}".replace(" ", "-").replace(":", "of").replace("%", "")
        )
        folder = args.out_dir if len(runs) == 1 or not args.out_dir else args.out_dir / f"{algo}-seed{seed}"
        folder = report.new_folder(folder, name)
        report.write_json(folder / "args.json", {**vars(args), "algo": algo, "seed": seed})
        report.write_json(folder / "environment.json", report.environment(device))
        chosen = options.from_flags(args, seed)
        images, indices = (None, []) if algo == "MP" else data.calibration(args.ngrads, seed)
        report.write_json(folder / "calibration.json", {"indices": indices})
        progress = report.Progress(f"{algo} {pattern}, seed {seed}")
        settings = {"arch": args.arch, "dset": args.dset, "pattern": str(pattern), "algo": algo, "seed": seed}
        try:
            pruned = prune(model, images, masked.masks, chosen, algo=algo, device=device, on_layer=progress)
        except Interrupted as stopped:
            report.save(folder, stopped.result, {**settings, **common, "finished": False})
            raise SnowsError(f"{stopped}: those are saved in {folder}, the other layers are still dense.") from None
        finally:
            progress.close()
        pruned.left_dense = masked.left_dense
        metrics = {
            **settings,
            **common,
            "accuracy": evaluate.accuracy(pruned.model, test, device),
            "seconds": pruned.seconds,
            "curvature_products": pruned.curvature_products,
            "cg_iterations": sum(layer.cg_iterations for layer in pruned.layers),
            "peak_memory_bytes": report.peak_memory(device),
            "test_images": len(data.test),
            "calibration_images": len(indices),
            "options": vars(chosen),
            "left_dense": pruned.left_dense,
            "finished": True,
        }
        records.append(report.save(folder, pruned, metrics))
        print(report.summary(records[-1]), f"\n  saved in {folder}", flush=True)
    return records


def warn_if_far(measured: float, stated: float | None) -> None:
    """Warn where the dense accuracy is not what the weights are known for."""
    if stated is not None and measured < stated - FAR_FROM_STATED:
        print(
            f"warning: these weights are stated to reach {stated:.2f} %, far above the {measured:.2f} % measured here. "
            f"The usual cause is a wrong normalisation (--mean, --std) or another test set.",
            file=sys.stderr,
        )


def shell(main: Callable[[], object]) -> None:
    """Run a script's main: an error that the user can mend ends in one line; 2 is wrong usage, 130 is Ctrl-C."""
    try:
        main()
    except SnowsError as error:
        stopped = isinstance(error.__context__, Interrupted)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(130 if stopped else 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print("interrupted: nothing was solved yet", file=sys.stderr)
        sys.exit(130)
