"""Loss and residual of one layer's Newton step against the number of products, with the preconditioner and without.

    python bench/convergence.py resnet20_cifar10 --checkpoint resnet20_cifar10.pt --dset cifar10.npz
    python bench/convergence.py vit_cifar10 --dset cifar10.npz

Three layers, masked to 1:4 one at a time in the dense network, so that each system stands for itself. One Newton step
of up to 100 products, plain and preconditioned; and several preconditioned steps of 5 products each. One row per
point, a plot of them (the K-step loss after the line search, over products), and in a second file, NAME_needed.csv,
after how many products each kind reaches what plain CG reaches after the most.
"""

import argparse

import torch
from common import Parser, Results, panels, save_figure, write
from networks import NETWORKS, cifar10, trained, weights

from snows import NM, Options
from snows.calibration.stream import Stream
from snows.cli.shell import shell
from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.tangent import dot
from snows.solve.cg import conjugate_gradients
from snows.solve.curvature import Curvature
from snows.solve.objective import reconstruction
from snows.solve.preconditioner import row_inverses
from snows.solve.solver import backtrack, solve

LAYERS = {
    "resnet20_cifar10": ["layer1.1.conv1", "layer2.1.conv2", "layer3.1.conv1"],
    "vit_cifar10": ["blocks.0.attn.qkv", "blocks.2.attn.proj", "blocks.4.mlp.fc1"],
}
PRODUCTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)
DAMPING = 1e-3
SHORT, STEPS = 5, (1, 2, 3, 4)  # products of each of several Newton steps, and how many of these
KINDS = ("plain", "preconditioned", "several steps")


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
    """One row for each kind of solve and number of products."""
    streams = [Stream(network, network.model, list(images.split(args.batch_size)), args.device) for _ in range(2)]
    for stream in streams:
        stream.advance(layer.node)
    objective = reconstruction([layer], *streams, Options(k_step=args.k_step))
    weight = network.model.get_parameter(layer.parameter)
    mask = NM(1, 4).mask(weight)
    theta, support = objective.variables.pack([weight * mask]), objective.variables.pack([mask], True)
    here, precondition = Curvature(objective, theta), row_inverses(objective, theta, support, seed=0)
    gradient, rows = here.gradient * support, []

    def add(kind: str, products: float, residual: float, loss: float) -> None:
        found = {"kind": kind, "products": round(products), "residual": residual, "loss": loss}
        rows.append({"layer": layer.name, **found, "loss_before": here.loss.item()})
        print(*rows[-1].values(), flush=True)

    for kind, known in zip(KINDS, (None, precondition)):
        product = Replayed(lambda vector: here.matvec(vector) * support)
        for count in PRODUCTS:
            product.start()
            cg = conjugate_gradients(product, -gradient, known, DAMPING, 0.0, count)
            search = backtrack(objective.loss, theta, cg.step, here.loss, dot(gradient, cg.step))
            add(kind, cg.iterations, cg.residuals[-1], search.loss.item())
    options = Options(max_CG_iterations=SHORT, cg_tolerance=0.0, damping=DAMPING, batching=False)
    for steps in STEPS:
        _, stats = solve(objective, theta, support, precondition, options.but(newton_steps=steps))
        add(KINDS[-1], stats.products, stats.residuals[-1][-1], stats.loss_after)
    return rows


def needed(rows: list[dict]) -> list[dict]:
    """For each layer, the products after which each kind's loss is what plain CG reaches after the most."""
    result = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of = {kind: [row for row in rows if (row["layer"], row["kind"]) == (layer, kind)] for kind in KINDS}
        goal = of["plain"][-1]["loss"]
        reached = {kind: [row["products"] for row in of[kind] if row["loss"] <= goal] for kind in KINDS}
        result.append({"layer": layer, **{kind: min(products, default=None) for kind, products in reached.items()}})
    return result


def plot(rows: list[dict]):
    """Loss over products, one panel per layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = panels(1, len(layers), 4 * len(layers), 3.5)
    for layer, panel in zip(layers, axes[0]):
        for kind in KINDS:
            curve = [row for row in rows if (row["layer"], row["kind"]) == (layer, kind)]
            panel.loglog([row["products"] for row in curve], [row["loss"] for row in curve], ".-", label=kind)
        panel.set_title(layer, fontsize=9)
        panel.set_xlabel("products")
    axes[0, 0].set_ylabel("K-step loss")
    axes[0, 0].legend()
    return figure


def main():
    parser = Parser(__doc__, "convergence_{network}.csv", "--checkpoint", "--dset", "--device")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--k_step", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    args = parser.parse()
    checkpoint = weights(args.network, args.checkpoint)
    results = Results(args.out, args.device, (checkpoint, args.dset))
    images, _ = cifar10(args.dset).calibration(args.images, 0)
    network, chosen = Network(trained(args.network, checkpoint), args.device), LAYERS[args.network]
    rows = [row for layer in network.layers if layer.name in chosen for row in curves(network, layer, images, args)]
    results.replace(rows)
    write(args.out.with_name(f"{args.out.stem}_needed.csv"), needed(rows))
    save_figure(plot(rows), args.out)
    print(*needed(rows), sep="\n")


if __name__ == "__main__":
    shell(main)
