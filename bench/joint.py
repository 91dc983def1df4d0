"""What joint steps come to, with and without the products of the steps before in their preconditioner.

    python bench/joint.py --checkpoint resnet20_cifar10.pt --dset cifar10.npz [--images 512] [--steps 2 4 6]

The ResNet-20 of bench/cifar10.py. All rows of a pattern and a seed begin with the same network, as the passes over its
layers leave it. The loss is that of the joint steps; `held_out_error` is the relative error of the logits on training
images that no calibration draws. A row that the results file already holds is not measured again.
"""

import itertools

from common import Parser, Results
from networks import PATTERNS, Bench, held_out, weights

import snows
from snows.cli.shell import shell
from snows.result import Step
from snows.zoo.evaluate import accuracy, score

NETWORK = "resnet20_cifar10"


class Start:
    """The network before its joint steps, of a pattern and a seed."""

    def __init__(self, bench: Bench, run: dict):
        self.bench, self.run = bench, run
        self.calibration, _ = bench.data.calibration(run["images"], run["seed"])
        self.unseen = list(held_out(bench.data))
        _, self.logits = score(bench.model, self.unseen, bench.device)
        self.steps: list[Step] = []
        self.prune(snows.Options(seed=run["seed"], joint_steps=0), listener=lambda step, job: self.steps.append(step))

    def prune(self, options: snows.Options, **hooks) -> snows.Pruned:
        how = {"layers": self.bench.layers, "device": self.bench.device}
        return snows.prune(self.bench.model, self.calibration, PATTERNS[self.run["pattern"]], options, **how, **hooks)

    def measure(self, steps: int, recycle: int) -> dict:
        """The figures of so many joint steps that recycle so many products."""
        options = snows.Options(seed=self.run["seed"], joint_steps=steps, recycle=recycle)
        pruned, device = self.prune(options, finished=self.steps), self.bench.device
        stats = next(record for record in pruned.layers if record.joint)
        unseen, _ = score(pruned.model, self.unseen, device, self.logits)
        return {
            "loss_before": stats.loss_before,
            "loss_after": stats.loss_after,
            "products": sum(record.products for record in pruned.layers if record.joint),
            "held_out_error": unseen.logit_error,
            "accuracy": accuracy(pruned.model, self.bench.test, device),
            "seconds": sum(record.seconds for record in pruned.layers if record.joint),
        }


def main():
    parser = Parser(__doc__, "joint.csv", "--checkpoint", "--dset", "--device", "--seeds")
    parser.add_argument("--patterns", nargs="+", default=["1:4"], choices=PATTERNS, help="(default: 1:4)")
    parser.add_argument("--images", type=int, default=512, help="calibration images (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 6], help="joint steps (default: 2 4 6)")
    parser.add_argument("--recycle", type=int, nargs="+", default=[0, 20], help="products (default: 0 20)")
    args = parser.parse()
    bench = Bench(NETWORK, weights(NETWORK, args.checkpoint), args.dset, args.device)
    results = Results(args.out, args.device, (args.checkpoint, args.dset))
    for seed, pattern in itertools.product(args.seeds, args.patterns):
        shared, start = {"network": NETWORK, "pattern": pattern, "images": args.images, "seed": seed}, None
        ways = itertools.product(args.steps, args.recycle)
        for place, run in results.claimed([shared | {"joint_steps": a, "recycle": b} for a, b in ways]):
            start = start or Start(bench, shared)
            row = run | start.measure(run["joint_steps"], run["recycle"])
            results.add(row)
            print(f"{place}: {row}", flush=True)


if __name__ == "__main__":
    shell(main)
