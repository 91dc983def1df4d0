"""The README's figures on CIFAR-10: many settings, one results file per table.

    python bench/cifar10.py accuracy --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/cifar10.py vit --dset cifar10.npz

The checkpoint is the ResNet-20 of the WoodFisher, CHITA and SNOWS papers (normalisation mean = std = 0.5); `vit` takes
the ViT that ships in checkpoints/. A row that the results file already holds is not measured again, so an interrupted
table goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning"), str(ROOT / "VIT_pruning")]

from resnet_cifar import ResNet  # noqa: E402
from rows import Results  # noqa: E402
from vit_small import vit_cifar10  # noqa: E402

import snows  # noqa: E402
from snows.cli.shell import shell  # noqa: E402
from snows.zoo import images as data  # noqa: E402
from snows.zoo.classifiers import load_checkpoint  # noqa: E402
from snows.zoo.evaluate import accuracy  # noqa: E402

PATTERNS = {f"unstructured {share}": snows.Unstructured(share) for share in (0.5, 0.6, 0.7, 0.8, 0.9)}
PATTERNS |= {"2:4": snows.NM(2, 4), "1:4": snows.NM(1, 4), "4:8": snows.NM(4, 8)}
LAYER_BY_LAYER = {"algo": "SNOWS", "joint_steps": 0}
ACCURACY_RUNS = [{"algo": "MP"}, {"algo": "MP+"}, LAYER_BY_LAYER, {"algo": "SNOWS"}]
METHODS = ("MP", "MP+", "layer-by-layer", "SNOWS")
# Few images, so that a table takes minutes.
ABLATED = {"images": 256, "k_step": 8, "sweeps": 1, "schedule": 0, "joint_steps": 0}
ABLATED |= {"max_CG_iterations": 5, "cg_tolerance": 0.01}
ABLATION = [{}, *({"k_step": k} for k in (0, 2, 4, 16))]  # each row changes one choice of the first, or two
ABLATION += [{"targets": "same"}, {"curvature": "hessian"}, {"depth_weights": "mean"}, {"batching": True}]
ABLATION += [{"preconditioner": "none"}, {"biases": False}]
ABLATION += [{"newton_steps": 3}, {"images": 768}]  # as many products: more of them on the images, or more images
ABLATION += [{"images": 768, "newton_steps": steps, "curvature_images": 256} for steps in (2, 1)]
ABLATION += [{"sweeps": 2}, {"schedule": 2}, {"schedule": 2, "sweeps": 2}]
ABLATION_JOINT = {"joint_steps": 4, "joint_CG_iterations": 20}
ABLATION += [ABLATION_JOINT, {"schedule": 2, **ABLATION_JOINT}]
VIT_PATTERNS = ("2:4", "1:4", "4:8", "unstructured 0.5", "unstructured 0.6", "unstructured 0.7")
VIT_SOLVER = {"sweeps": 1, "schedule": 0, "joint_steps": 0, "max_CG_iterations": 10, "cg_tolerance": 0.01}
VIT_RUNS = [{"algo": "MP"}, {"algo": "MP+"}, *({"algo": "SNOWS", "k_step": k, **VIT_SOLVER} for k in (0, 3, 8))]
VIT_ABLATED = {"images": 512, "schedule": 0, "joint_steps": 0}
VIT_JOINT = {"joint_steps": 4, "joint_CG_iterations": 20, "joint_images": 256}
VIT_SHORT_STEPS = {"newton_steps": 2, "max_CG_iterations": 5}
VIT_ABLATION = [{}, {"biases": False}, VIT_SHORT_STEPS, {"sweeps": 2}, {"schedule": 2}]
VIT_ABLATION += [VIT_JOINT, {"schedule": 2, **VIT_JOINT}]


def rows_of(table: str, images: int = 1024, changes: dict | None = None) -> list[dict]:
    """What each row of a table runs; `accuracy` with so many images, and SNOWS there with options changed."""
    if table == "accuracy":
        patterns = [pattern for pattern in PATTERNS if pattern != "4:8"]
        runs = [{**run, **(changes or {})} if run["algo"] == "SNOWS" else run for run in ACCURACY_RUNS]
        return [{"pattern": pattern, **run, "images": images} for run in runs for pattern in patterns]
    if table == "vit":
        return [{"pattern": pattern, **run, "images": 2048} for pattern in VIT_PATTERNS for run in VIT_RUNS]
    if table == "vit_ablation":
        patterns, base = ("2:4", "1:4"), {"algo": "SNOWS", **VIT_ABLATED}
        return [{"pattern": pattern, **base, **change} for pattern in patterns for change in VIT_ABLATION]
    return [{"pattern": "1:4", "algo": "SNOWS", **ABLATED, **change} for change in ABLATION]


def method_of(run: dict) -> str:
    """What `--methods` calls a row: in `accuracy`, SNOWS without joint steps has a name of its own."""
    return "layer-by-layer" if LAYER_BY_LAYER.items() <= run.items() else run["algo"]


class Bench:
    """The dense network and its images; accuracies that several rows share are measured once."""

    def __init__(self, vit: bool, checkpoint: Path, dset: Path, device: str):
        self.model, self.device = vit_cifar10() if vit else ResNet(20, 10), device
        self.layers = (lambda name: name.startswith("blocks.")) if vit else (lambda name: True)
        load_checkpoint(self.model, checkpoint)
        self.model.eval()  # a forward pass in training mode would change the BatchNorm statistics of the dense network
        self.data = data.Data(*data.npz(dset, data.normalised((0.5,) * 3, (0.5,) * 3)))
        self.test = list(self.data.test_batches(128))
        self.dense_accuracy = accuracy(self.model, self.test, device)
        self.masked_accuracies = {}

    def masked_accuracy(self, pattern: str) -> float:
        if pattern not in self.masked_accuracies:
            masked = snows.prune(self.model, None, PATTERNS[pattern], algo="MP", layers=self.layers, device=self.device)
            self.masked_accuracies[pattern] = accuracy(masked.model, self.test, self.device)
        return self.masked_accuracies[pattern]

    def measure(self, run: dict, seed: int) -> dict:
        """One row's figures."""
        row = dict(run)
        pattern, algo, images = row.pop("pattern"), row.pop("algo"), row.pop("images")
        options = snows.Options(**row, seed=seed)
        calibration, _ = self.data.calibration(images, seed)
        pruned = snows.prune(
            self.model, calibration, PATTERNS[pattern], options, algo=algo, layers=self.layers, device=self.device
        )
        return {
            "dense_accuracy": self.dense_accuracy,
            "masked_accuracy": self.masked_accuracy(pattern),
            "accuracy": accuracy(pruned.model, self.test, self.device),
            "sparsity": pruned.sparsity,
            "curvature_products": pruned.curvature_products,
            "seconds": pruned.seconds,
            "peak_memory_bytes": pruned.peak_memory_bytes,
            "test_images": len(self.data.test),
            "seed": seed,
            "options": vars(options),
        }


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    header = ["run", "seed", "masked only", "accuracy", "zeros", "curvature products", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        name = ", ".join(f"{k} {v}" if k not in ("pattern", "algo") else v for k, v in row["run"].items())
        lines.append(
            f"| {name} | {row['seed']} | {row['masked_accuracy']:.2f} | {row['accuracy']:.2f} | {row['sparsity']:.2%} "
            f"| {row['curvature_products']:.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("accuracy", "ablation", "vit", "vit_ablation"))
    parser.add_argument("--checkpoint", type=Path, help="weights of the ResNet-20 (required) or of the ViT")
    parser.add_argument("--dset", type=Path, required=True, help="an .npz of CIFAR-10")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, help="only these rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these rows")
    parser.add_argument("--images", type=int, default=1024, help="calibration images of `accuracy` (default: 1024)")
    parser.add_argument("--out", type=Path, help="default: results/NETWORK_cifar10_TABLE.json")
    parser.add_argument(
        "--newton_steps", type=int, help="of SNOWS in `accuracy`: rows of their own (default: the option's)"
    )
    parser.add_argument("--curvature_images", type=int, help="likewise")
    parser.add_argument("--joint_images", type=int, help="likewise")
    args = parser.parse_args()
    vit = args.table.startswith("vit")
    checkpoint = args.checkpoint or (ROOT / "checkpoints" / "vit_cifar10.safetensors" if vit else None)
    if checkpoint is None:
        parser.error("--checkpoint is required for the ResNet-20")
    network, table = ("vit_cifar10", args.table.removeprefix("vit")) if vit else ("resnet20_cifar10_", args.table)
    out = args.out or ROOT / "results" / f"{network}{table}.json"
    results = Results(out, args.device, (checkpoint, args.dset))
    changes = {
        k: v for k in ("newton_steps", "curvature_images", "joint_images") if (v := getattr(args, k)) is not None
    }
    if changes and args.table != "accuracy":
        parser.error(f"--{next(iter(changes))} belongs to `accuracy`; the other tables have rows of their own for it")
    runs = [
        {"run": run, "seed": seed}
        for run in rows_of(args.table, args.images, changes)
        if run["pattern"] in (args.patterns or PATTERNS) and method_of(run) in (args.methods or METHODS)
        for seed in args.seeds
    ]
    bench = Bench(vit, checkpoint, args.dset, args.device)
    for _, run in results.claimed(runs):
        row = {**run, **bench.measure(**run)}
        results.add(row)
        print(markdown([row]).splitlines()[-1], flush=True)
    print(markdown(results.rows()))


if __name__ == "__main__":
    shell(main)
