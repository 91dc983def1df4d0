"""What an N:M-friendly order of the input channels is worth: magnitude kept, and accuracy with and without --permute.

    python bench/permute.py --checkpoint resnet20_cifar10.pt --dset cifar10.npz [--images 256] [--seeds 0 1 2]

The ResNet-20 and the ViT of bench/cifar10.py, magnitude masks, alone and with SNOWS in one pass. A row that the results
file already holds is not measured again.
"""

import itertools
from statistics import mean

from common import Parser, Results
from networks import NETWORKS, Bench, weights

import snows
from snows.cli.shell import shell
from snows.masks.permute import permute
from snows.zoo.evaluate import accuracy

PATTERNS = ("2:4", "1:4")
ONE_PASS = snows.Options(schedule=0, joint_steps=0)


def measure(bench: Bench, pattern: snows.NM, permuted: bool, seed: int, images: int) -> dict:
    """The figures of one row; `kept` is the mean share over the layers that can be permuted."""
    order = permute(bench.model, pattern, bench.layers)
    model = order.model if permuted else bench.model
    calibration, _ = bench.data.calibration(images, seed)
    job = {"layers": bench.layers, "device": bench.device}
    masked = snows.prune(model, None, pattern, algo="MP", **job)
    solved = snows.prune(model, calibration, pattern, ONE_PASS.but(seed=seed), **job)
    return {
        "layers_permuted": len(order.kept),
        "kept": mean(after if permuted else before for before, after in order.kept.values()),
        "dense_accuracy": accuracy(model, bench.test, bench.device),
        "masked_accuracy": accuracy(masked.model, bench.test, bench.device),
        "accuracy": accuracy(solved.model, bench.test, bench.device),
        "seconds": solved.seconds,
    }


def main():
    parser = Parser(__doc__, "permute.csv", "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("--images", type=int, default=256, help="calibration images (default: 256)")
    args = parser.parse()
    given = {"resnet20_cifar10": args.checkpoint}
    checkpoints = {network: weights(network, given.get(network)) for network in NETWORKS}
    results = Results(args.out, args.device, (*checkpoints.values(), args.dset))
    for network, checkpoint in checkpoints.items():
        bench = Bench(network, checkpoint, args.dset, args.device)
        shared = {"network": network, "images": args.images}
        runs = [
            {**shared, "pattern": pattern, "permuted": permuted, "seed": seed}
            for seed, pattern, permuted in itertools.product(args.seeds, PATTERNS, (False, True))
        ]
        for _, run in results.claimed(runs):
            row = {**run, **measure(bench, snows.NM.parse(run["pattern"]), run["permuted"], run["seed"], args.images)}
            results.add(row)
            print(*run.values(), *(f"{row[k]:.2f}" for k in ("kept", "masked_accuracy", "accuracy")), flush=True)


if __name__ == "__main__":
    shell(main)
