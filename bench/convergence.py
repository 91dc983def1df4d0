"""Loss and residual of one layer's Newton step against the number of products, with the preconditioner and without.

    python bench/convergence.py resnet20_cifar10 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/convergence.py vit_cifar10 --dset cifar10.npz

Three layers, masked to 1:4 one at a time in the dense network, so that each system stands for itself. Writes
{"machine": ..., "rows": [...]} and a plot: the K-step loss after the line search, over products.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning"), str(ROOT / "VIT_pruning")]

from resnet_cifar import ResNet  # noqa: E402
from vit_small import vit_cifar10  # noqa: E402

from snows import NM, Options, data, run_folder  # noqa: E402
from snows.classifier import load_checkpoint  # noqa: E402
from snows.graph import Layer, Network, Stream  # noqa: E402
from snows.memory import keep_freed_memory  # noqa: E402
from snows.objective import reconstruction  # noqa: E402
from snows.preconditioner import row_inverses  # noqa: E402
from snows.solver import backtrack, conjugate_gradients, dot  # noqa: E402

NETWORKS = {  # name -> (builder, three layers)
    "resnet20_cifar10": (lambda: ResNet(20, 10), ["layer1.1.conv1", "layer2.1.conv2", "layer3.1.conv1"]),
    "vit_cifar10": (vit_cifar10, ["blocks.0.attn.qkv", "blocks.2.attn.proj", "blocks.4.mlp.fc1"]),
}
PRODUCTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)


class Replayed:
    """A product that remembers its results: solving again from the start to a higher count repeats none."""

    def __init__(self, product):
        self.product, self.known, self.taken = product, [], 0

    def start(self) -> None:
        self.taken = 0

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        if self.taken == len(self.known):
            self.known.append(self.product(vector))
        self.taken += 1
        return self.known[self.taken - 1]


def curves(network: Network, layer: Layer, images: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """One row for each preconditioner and number of products."""
    streams = [Stream(network, network.model, list(images.split(args.batch_size)), args.device) for _ in range(2)]
    for stream in streams:
        stream.advance(layer.node)
    objective = reconstruction(layer, *streams, Options(k_step=args.k_step))
    weight = network.model.get_parameter(layer.parameter)
    mask = NM(1, 4).mask(weight)
    unknown, support = objective.join(weight * mask), objective.join(mask, True)
    here = objective.linearise(unknown)
    gradient, rows = here.gradient * support, []
    for name, precondition in (("rows", row_inverses(objective, unknown, support, seed=0)), ("none", None)):
        product = Replayed(lambda vector: here.product(vector) * support)
        for count in PRODUCTS:
            product.start()
            cg = conjugate_gradients(product, -gradient, precondition, 1e-3, 0.0, count)
            search = backtrack(objective.loss, unknown, cg.step, here.loss, dot(gradient, cg.step))
            rows.append(
                {
                    "layer": layer.name,
                    "preconditioner": name,
                    "products": cg.iterations,
                    "residual": cg.residuals[-1],
                    "loss": search.loss.item(),
                    "loss_before": here.loss.item(),
                }
            )
            print(*rows[-1].values(), flush=True)
    return rows


def needed(rows: list[dict]) -> dict[str, int]:
    """For each layer, the products after which the preconditioned loss is what plain CG reaches after the most."""
    result = {}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        plain = [row for row in rows if row["layer"] == layer and row["preconditioner"] == "none"]
        ours = [row for row in rows if row["layer"] == layer and row["preconditioner"] == "rows"]
        reached = [row["products"] for row in ours if row["loss"] <= plain[-1]["loss"]]
        result[layer] = min(reached, default=None)
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Loss over products, one panel per layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, panels = plt.subplots(1, len(layers), figsize=(4 * len(layers), 3.5), layout="constrained")
    for layer, axes in zip(layers, panels):
        for name in ("none", "rows"):
            curve = [row for row in rows if row["layer"] == layer and row["preconditioner"] == name]
            axes.loglog([row["products"] for row in curve], [row["loss"] for row in curve], ".-", label=name)
        axes.set_title(layer, fontsize=9)
        axes.set_xlabel("products")
    panels[0].set_ylabel("K-step loss")
    panels[0].legend(title="preconditioner")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--checkpoint", type=Path, help="default: what ships in checkpoints/")
    parser.add_argument("--dset", type=Path, required=True, help="an .npz of CIFAR-10")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--k_step", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="default: results/convergence_NETWORK.json")
    args = parser.parse_args()
    keep_freed_memory()
    build, names = NETWORKS[args.network]
    model = build()
    load_checkpoint(model, args.checkpoint or ROOT / "checkpoints" / f"{args.network}.safetensors")
    images, _ = data.Data(*data.npz(args.dset, data.normalised((0.5,) * 3, (0.5,) * 3))).calibration(args.images, 0)
    network = Network(model, args.device)
    rows = [row for layer in network.layers if layer.name in names for row in curves(network, layer, images, args)]
    out = args.out or ROOT / "results" / f"convergence_{args.network}.json"
    environment = run_folder.environment(args.device)
    summary = {"machine": environment["machine"], "environment": environment, "needed": needed(rows)}
    run_folder.write_json(out, {**summary, "rows": rows})
    plot(rows, out.with_suffix(".svg"))
    print(summary["needed"])


if __name__ == "__main__":
    main()
