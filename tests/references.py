"""Objectives of one layer and of all of them on tiny networks, and their dense float64 references."""

from functools import cached_property

import timm
import torch
from helpers import randomise

from snows.calibration.stream import Stream
from snows.calibration.streams import Streams
from snows.network.network import Network
from snows.options import Options
from snows.solve.joint import joint_objective
from snows.solve.objective import reconstruction


def build(model, images, index, k_step, curvature, batch=2, **options):
    """(objective, theta of the dense weights, a perturbed theta) of layer `index`."""
    network = Network(model)
    layer = network.layers[index]
    stream = Stream(network, network.model, list(images.split(batch)), "cpu")
    stream.advance(layer.node)
    weight = network.model.get_parameter(layer.parameter)
    options = Options(k_step=k_step, curvature=curvature, **{"targets": "same", "biases": False, **options})
    objective = reconstruction([layer], stream, stream, options)
    weight = objective.variables.pack([weight])
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    return objective, weight, weight + 0.3 * noise


class DenseReference:
    """The whole loss differentiated, all micro-batches at once; its matrices (n, n) only when they are asked for."""

    def __init__(self, objective, weight):
        self.objective, self.weight = objective, weight

    def features(self, w):
        """(feature, target, coefficient) of each depth and micro-batch."""
        o = self.objective
        return [each for i in o.indices for each in zip(o.features(o.inputs(i), w), o.targets(i), o.coefficients)]

    def loss_at(self, w):
        return sum(c * (f - y).square().sum() for f, y, c in self.features(w))

    @property
    def loss(self):
        return self.loss_at(self.weight)

    @property
    def gradient(self):
        return torch.autograd.functional.jacobian(self.loss_at, self.weight)

    @cached_property
    def hessian(self):
        n = self.weight.numel()
        return torch.autograd.functional.hessian(self.loss_at, self.weight, vectorize=True).reshape(n, n)

    @cached_property
    def gauss_newton(self):
        def scaled(w):
            return torch.cat([c**0.5 * f.flatten() for f, _, c in self.features(w)])

        jacobian = torch.autograd.functional.jacobian(scaled, self.weight, vectorize=True)
        jacobian = jacobian.reshape(-1, self.weight.numel())
        return 2 * jacobian.T @ jacobian

    def matrix(self, curvature):
        return self.hessian if curvature == "hessian" else self.gauss_newton


def tiny_vit():
    sizes = dict(img_size=8, patch_size=4, embed_dim=4, num_heads=2, depth=2, mlp_ratio=1, num_classes=3, in_chans=2)
    return randomise(timm.create_model("vit_tiny_patch16_224", init_values=1e-2, **sizes))


def build_jointly(model, images, options=None, layers=lambda name: True):
    """(objective, theta of the dense weights, a perturbed theta)."""
    network = Network(model)
    chosen = [layer for layer in network.layers if layers(layer.name)]
    objective = joint_objective(chosen, Streams(network, list(images.split(2)), "cpu"), options or Options())
    theta = objective.variables.pack([network.model.get_parameter(layer.parameter) for layer in chosen])
    noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(3), dtype=theta.dtype)
    return objective, theta, theta + 0.1 * noise


def matrix(n, seed, lowest=0.1):
    """A random symmetric matrix (n, n) whose eigenvalues run from `lowest` to 3."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.linspace(lowest, 3, n, dtype=torch.float64)) @ q.T
