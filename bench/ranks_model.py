"""What sharing images among GPUs should take: a model, from the networks' shapes and the assumptions below.

    python bench/ranks_model.py [--out FILE]

One row per network, number of images and machines: seconds of computation and of exchange in one sweep, layer by layer
(one Newton step of ten products for each layer, 2:4), and in one joint step of ten products. Nothing of it is measured.
"""

import timm
import torch
from common import Parser, write
from torch import nn

from snows.budget import LAYER_INVERSES
from snows.cli.shell import shell

NETWORKS = {"ResNet-50": "resnet50", "ViT-L/16": "vit_large_patch16_224"}
IMAGES = (3_000, 100_000)
# name -> (processes, bytes per second that each sends, seconds until an exchange begins)
MACHINES = {
    "1 GPU": (1, 1.0, 0.0),
    "8 GPUs in a box": (8, 300e9, 30e-6),
    "8 boxes, 25 GbE": (8, 2.8e9, 200e-6),
}
FLOPS = 100e12  # floating-point operations per second of a GPU, in such products
INVERSE_FLOPS = 5e12  # the same where many small matrices are inverted
PASSES = 3  # forward passes that a product costs: a tangent pass, a backward pass
PRODUCTS = 11  # of a Newton step: ten, and the gradient
K = 4  # operations after a layer that its window holds


class Layer:
    """A prunable layer, by its shape: what it computes for an image, and what is exchanged for it."""

    def __init__(self, module: nn.Module, positions: int):
        self.out, self.inputs = module.weight.shape[0], module.weight[0].numel()
        self.groups = getattr(module, "groups", 1)
        self.macs = positions * module.weight.numel()
        self.theta_bytes = 4 * module.weight.numel()
        self.moment_bytes = 4 * self.groups * (self.inputs + 1) ** 2

    def inverse_flops(self) -> float:
        """Of the row inverses, on half of the inputs (2:4), in blocks as long as LAYER_INVERSES allows."""
        size = self.inputs // 2 + 1
        width = max(1, min(size, LAYER_INVERSES // (4 * self.out * size)))
        return 2 * self.out * size * width**2


def layers_of(network: str) -> list[Layer]:
    """The layers of a network, found by a forward pass that computes nothing."""
    found, hooks = [], []

    def note(module, inputs, output):
        channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
        found.append(Layer(module, output.numel() // channels))

    with torch.device("meta"):
        model = timm.create_model(network)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.append(module.register_forward_hook(note))
        model(torch.empty(1, 3, 224, 224))
    return found


def row(network: str, images: int, machines: str) -> dict:
    """What the model says of one case."""
    layers, (processes, rate, latency) = layers_of(NETWORKS[network]), MACHINES[machines]
    theta, moments = (sum(getattr(layer, name) for layer in layers) for name in ("theta_bytes", "moment_bytes"))
    forward = 2 * sum(layer.macs for layer in layers) * images / FLOPS / processes
    share = 2 * (processes - 1) / processes  # of what is summed, that each process sends

    def exchange(count: float, size: float) -> float:
        return 0.0 if processes == 1 else share * size / rate + count * latency

    sweep_bytes = PRODUCTS * theta + moments + 1.25 * theta  # and at its end the weights and the masks of the first
    return {
        "network": network,
        "images": images,
        "machines": machines,
        "layers": len(layers),
        "product_bytes": theta,
        "moment_bytes": moments,
        "sweep_bytes": int(sweep_bytes),
        "sweep_seconds": PRODUCTS * PASSES * (K + 1) * forward,
        "sweep_exchange_seconds": exchange(len(layers) * (2 * PRODUCTS + 20), sweep_bytes),
        "inverse_seconds": sum(layer.inverse_flops() for layer in layers) / INVERSE_FLOPS,
        "joint_seconds": PRODUCTS * PASSES * forward,
        "joint_exchange_seconds": exchange(2 * PRODUCTS + 3 * len(layers), PRODUCTS * theta + moments),
    }


def main():
    args = Parser(__doc__, "ranks_model.csv").parse()
    cases = [(network, images, machines) for network in NETWORKS for images in IMAGES for machines in MACHINES]
    write(args.out, [row(*case) for case in cases])


if __name__ == "__main__":
    shell(main)
