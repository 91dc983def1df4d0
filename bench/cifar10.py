"""Accuracy on CIFAR-10: many patterns, methods and options, one results file per table.

    python bench/cifar10.py accuracy --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/cifar10.py vit --dset cifar10.npz

The checkpoint is the ResNet-20 of the WoodFisher, CHITA and SNOWS papers (normalisation mean = std = 0.5); `vit` takes
the ViT that ships in checkpoints/. A row that the results file already holds is not measured again, so an interrupted
table goes on where it stopped. A row's `flags` are the options that it sets, as the scripts take them.
"""

import argparse
from fnmatch import fnmatchcase

import torch
from common import RESULTS, Parser, Results
from networks import PATTERNS, Bench, views, weights

import snows
from snows.cli.option_flags import add_option_flags, options_of
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.zoo.evaluate import accuracy

TABLES = {  # name -> (network, results file)
    "accuracy": ("resnet20_cifar10", "resnet20_cifar10_accuracy.csv"),
    "ablation": ("resnet20_cifar10", "resnet20_cifar10_ablation.csv"),
    "vit": ("vit_cifar10", "vit_cifar10.csv"),
    "vit_ablation": ("vit_cifar10", "vit_cifar10_ablation.csv"),
}
LAYER_BY_LAYER = {"algo": "SNOWS", "joint_steps": 0}
# As in the paper: the 1 x 1 shortcuts stay dense, and the calibration images are mirrored and cut out at random.
PUBLISHED = {"algo": "SNOWS", "protocol": "published"}
ACCURACY_RUNS = [{"algo": "MP"}, {"algo": "MP+"}, LAYER_BY_LAYER, {"algo": "SNOWS"}, PUBLISHED]
METHODS = ("MP", "MP+", "layer-by-layer", "SNOWS", "published")
SHORTCUTS = "*downsample*"
# Few images, so that a table takes minutes.
ABLATED = {"images": 256, "sweeps": 1, "k_step": 8, "schedule": 0, "joint_steps": 0}
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
# Of SNOWS in `accuracy`, by flags of the same names.
CHANGES = ("schedule", "newton_steps", "curvature_images", "joint_images", "joint_steps", "mixtures")


def runs_of(table: str, images: int = 1024, changes: dict | None = None) -> list[dict]:
    """What each row of a table runs; `accuracy` with so many images, and SNOWS there with options changed."""
    if table == "accuracy":
        patterns = [pattern for pattern in PATTERNS if pattern != "4:8"]
        runs = [{**(changes or {}), **run} if run["algo"] == "SNOWS" else run for run in ACCURACY_RUNS]
        return [{"pattern": pattern, "images": images, **run} for run in runs for pattern in patterns]
    if table == "vit":
        return [{"pattern": pattern, **run, "images": 2048} for pattern in VIT_PATTERNS for run in VIT_RUNS]
    if table == "vit_ablation":
        patterns, base = ("2:4", "1:4"), {"algo": "SNOWS", **VIT_ABLATED}
        return [{"pattern": pattern, **base, **change} for pattern in patterns for change in VIT_ABLATION]
    return [{"pattern": "1:4", "algo": "SNOWS", **ABLATED, **change} for change in ABLATION]


def method_of(run: dict) -> str:
    """What `--methods` calls a run: in `accuracy`, SNOWS without joint steps or by a protocol has its own name."""
    return run.get("protocol") or ("layer-by-layer" if LAYER_BY_LAYER.items() <= run.items() else run["algo"])


def row_of(run: dict) -> dict:
    """What tells a row from others: pattern, method, images, and the options that it sets as flags."""
    row = {name: run[name] for name in ("pattern", "algo", "images")}
    flags = (
        "--permute" if name == "permute" else f"--{name} {value}" for name, value in run.items() if name not in row
    )
    return {**row, "flags": " ".join(flags)}


def read(flags: str) -> argparse.Namespace:
    """What a row's flags say: the options, and how the network, its images and its masks are made."""
    parser = argparse.ArgumentParser()
    add_option_flags(parser)
    parser.add_argument("--protocol", choices=["published"])
    parser.add_argument("--permute", action="store_true")
    parser.add_argument("--mask_alg", default="MP")
    return parser.parse_args(flags.split())


def pruned_as_published(layer: str) -> bool:
    return not fnmatchcase(layer, SHORTCUTS)


def measure(bench: Bench, row: dict) -> dict:
    """One row's figures."""
    args = read(row["flags"])
    chosen, published = options_of(args, row["seed"]), args.protocol is not None
    calibration, _ = bench.data.calibration(row["images"], row["seed"])
    layers, pattern, model = bench.layers, PATTERNS[row["pattern"]], bench.model
    if published:
        calibration = views(calibration, torch.Generator().manual_seed(row["seed"]))
        layers = pruned_as_published
    if args.permute:
        model = permute(model, pattern, layers).model
    job = dict(algo=row["algo"], mask_alg=args.mask_alg, layers=layers, device=bench.device)
    usual = not (published or args.permute or args.mask_alg != "MP")
    pruned = snows.prune(model, calibration, pattern, chosen, **job)
    return {
        "dense_accuracy": bench.dense_accuracy,
        "masked_accuracy": bench.masked_accuracy(row["pattern"]) if usual else None,
        "accuracy": accuracy(pruned.model, bench.test, bench.device),
        "sparsity": pruned.sparsity,
        "curvature_products": pruned.curvature_products,
        "seconds": pruned.seconds,
        "peak_memory_bytes": pruned.peak_memory_bytes,
        "test_images": len(bench.data.test),
        "options": {name: value for name, value in vars(chosen).items() if name != "seed"},
    }


def flags() -> Parser:
    parser = Parser(__doc__, None, "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, help="only these rows")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these rows")
    parser.add_argument("--images", type=int, default=1024, help="calibration images of `accuracy` (default: 1024)")
    for name in CHANGES:
        parser.add_argument(f"--{name}", type=int, help="of SNOWS in `accuracy`: rows of their own (default: none)")
    parser.add_argument("--joint_stages", action="store_const", const=True, help="the same of joint steps on the way")
    parser.add_argument("--mask_alg", default="MP", choices=["MP", "ALPS"], help="of SNOWS (default: MP)")
    parser.add_argument("--permute", action="store_true", help="the same of channels in a better order, under N:M")
    return parser


def main():
    parser = flags()
    args = parser.parse()
    network, file = TABLES[args.table]
    changes = {name: value for name in (*CHANGES, "joint_stages") if (value := getattr(args, name)) is not None}
    changes |= {"permute": True} if args.permute else {}
    changes |= {"mask_alg": args.mask_alg} if args.mask_alg != "MP" else {}
    if changes and args.table != "accuracy":
        parser.error(f"--{next(iter(changes))} belongs to `accuracy`; the other tables have rows of their own for it")
    checkpoint = weights(network, args.checkpoint)
    results = Results(args.out or RESULTS / file, args.device, (checkpoint, args.dset))
    rows = [
        {**row_of(run), "seed": seed}
        for run in runs_of(args.table, args.images, changes)
        if run["pattern"] in (args.patterns or PATTERNS) and (":" in run["pattern"] or not args.permute)
        if method_of(run) in (args.methods or METHODS)
        for seed in args.seeds
    ]
    bench = Bench(network, checkpoint, args.dset, args.device)
    for position, row in results.claimed(rows):
        found = measure(bench, row)
        results.add({**row, **found})
        name = " ".join(str(value) for value in row.values() if value != "")
        print(f"{position}: {name}: {found['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    shell(main)
