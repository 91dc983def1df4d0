"""What a curvature product costs, in forward passes of its window.

    python bench/products.py [--networks ...] [--device cuda] [--out FILE]

The floor of a Gauss-Newton product is two forward-equivalents: one tangent pass and one backward pass. Forward passes
and products are timed in turn, so that a busy machine slows both; the median of several rounds counts. Random weights:
the cost does not depend on them. One row per layer and curvature, and a plot.
"""

import argparse
import statistics
import time

import torch
import torchvision
from common import Parser, Results, panels, save_figure
from resnet_cifar import ResNet
from vit_small import vit_cifar10

from snows.calibration.stream import Stream
from snows.cli.flags import whole
from snows.cli.shell import shell
from snows.network.layers import Layer
from snows.network.network import Network
from snows.options import Options
from snows.solve.curvature import Curvature
from snows.solve.objective import reconstruction

NETWORKS = {  # name -> (builder, pixels, batch)
    "resnet20_cifar10": (lambda: ResNet(20, 10), 32, 128),
    "vit_cifar10": (vit_cifar10, 32, 128),
    "resnet50": (torchvision.models.resnet50, 224, 8),
    "vit_b_16": (torchvision.models.vit_b_16, 224, 8),
}


def seconds(work, device: str) -> float:
    """Wall-clock seconds of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(network: Network, layer: Layer, images: torch.Tensor, args: argparse.Namespace, curvature: str) -> dict:
    """Median seconds of a forward pass and of a product of one layer's window."""
    stream = Stream(network, network.model, [images], args.device)
    stream.advance(layer.node)
    objective = reconstruction(
        [layer], stream, stream, Options(k_step=args.k_step, targets="same", curvature=curvature)
    )
    theta = objective.variables.pack([network.model.get_parameter(layer.parameter)])
    here, vector = Curvature(objective, theta), torch.randn_like(theta)
    values = objective.inputs(0)

    @torch.no_grad()
    def forward():
        objective.features(values, theta)

    rounds = [
        (seconds(forward, args.device), seconds(lambda: here.matvec(vector), args.device))
        for _ in range(args.rounds + 1)
    ]
    forwards, products = (statistics.median(column) for column in zip(*rounds[1:]))  # the first one warms up
    return {
        "layer": layer.name,
        "curvature": curvature,
        "k_step": args.k_step,
        "batch": len(images),
        "forward_seconds": forwards,
        "product_seconds": products,
        "ratio": products / forwards,
    }


def plot(rows: list[dict]):
    """The ratio of every measured layer, one column of points for each network and curvature."""
    figure, ((axes,),) = panels(1, 1, 8, 4.5)
    kinds = list(dict.fromkeys((row["network"], row["curvature"]) for row in rows))
    for x, kind in enumerate(kinds):
        ratios = [row["ratio"] for row in rows if (row["network"], row["curvature"]) == kind]
        axes.plot([x] * len(ratios), ratios, "o", alpha=0.6)
        axes.text(x, max(ratios) + 0.1, f"{statistics.median(ratios):.2f}", ha="center")
    axes.axhline(2, color="grey", linewidth=1)
    axes.set_xticks(range(len(kinds)), [f"{network}\n{curvature}" for network, curvature in kinds], fontsize=8)
    axes.set_ylabel("forward passes per product (number: median)")
    axes.set_ylim(bottom=0)
    return figure


def main():
    parser = Parser(__doc__, "products.csv", "--device")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--curvatures", nargs="+", default=["ggn", "hessian"], choices=("ggn", "hessian"))
    parser.add_argument("--layers", type=whole(1), default=6, help="layers of each network, evenly spread (default: 6)")
    parser.add_argument("--k_step", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse()
    results, rows = Results(args.out, args.device), []
    for name in args.networks:
        build, pixels, batch = NETWORKS[name]
        torch.manual_seed(0)
        network = Network(build(), args.device)
        images = torch.randn(batch, 3, pixels, pixels)
        spacing = len(network.layers) / args.layers
        for layer in dict.fromkeys(network.layers[int((i + 0.5) * spacing)] for i in range(args.layers)):
            for curvature in args.curvatures:
                rows.append({"network": name, **measure(network, layer, images, args, curvature)})
                print(f"{name:<18} {layer.name:<50} {curvature:<8} {rows[-1]['ratio']:.2f}", flush=True)
    results.replace(rows)
    save_figure(plot(rows), args.out)


if __name__ == "__main__":
    shell(main)
