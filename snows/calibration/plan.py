"""What a job will hold, known from the shapes of one image's features before the first layer is solved.

From it follow how many images a micro-batch may have for each window, and what is held or computed again. Both are
decided by constants where the memory allows it, not by what happens to be free, so that the same job gives the same
bits on machines of any size.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snows.calibration.staging import nbytes
from snows.network.inputs import moment_size
from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.trace import Values
from snows.network.window import Window

LINEAR = (operator.add, torch.add, F.linear, F.conv2d)  # functions that keep no slope
HESSIAN = 3  # times what a linearisation takes: the graph of the gradient, which is differentiated again (2.6 measured)
MATRICES = 5  # float64, of a layer's inputs by its inputs, while its second moment is decomposed
VECTORS = 14  # of theta's size that the solver holds at a time, its products' included


@dataclass
class Plan:
    """Bytes per image: of every node's output, and of what its linearisation keeps in addition."""

    network: Network
    output: dict[fx.Node, int] = field(default_factory=dict)
    kept: dict[fx.Node, int] = field(default_factory=dict)
    images: int = 0
    passing: int = 0  # bytes per image that are alive on the way through the network, at the most
    needs: dict[tuple[str, int, int, str], int] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, images: Tensor, count: int) -> Plan:
        """The plan for `count` images like these, of which one or two go through the network once."""
        plan, few = cls(network, images=count), images[:2]
        values: Values = {network.input: few}
        steps = [node for node in network.nodes[1:-1] if node.op != "get_attr"]
        for node in itertools.chain([network.input], network.walk(steps, network.model, values, {})):
            plan.output[node] = nbytes(values[node]) // len(few)
            plan.kept[node] = kept_for_derivative(network, node, values) // len(few)
            plan.passing = max(plan.passing, sum(plan.output[each] for each in values))
        return plan

    def need(self, layers: Sequence[Layer], k_step: int, curvature: str = "ggn") -> int:
        """Bytes per image that work on a layer, or on several at once, takes: the most of what it does."""
        key = (layers[0].name, len(layers), k_step, curvature)
        if key not in self.needs:
            window = Window(self.network, layers, k_step)
            columns = max(map(self.columns, window.layers))
            linearised = self.linearisation(window) * (HESSIAN if curvature == "hessian" else 1)
            self.needs[key] = max(linearised, columns, self.passing)
        return self.needs[key]

    def linearisation(self, window: Window) -> int:
        """Bytes per image while a window is linearised: what is kept, and what comes and goes meanwhile.

        Kept: the output of every node, and what its derivative needs besides. Meanwhile come and go, for all of the
        features, their targets, residuals and cotangents.
        """
        nodes = [node for node in window.nodes if node in self.output and not window.is_identity(node)]
        kept = sum(self.output[node] + self.kept[node] for node in nodes)
        return kept + 3 * sum(self.output[node] for node in window.features)

    def columns(self, layer: Layer) -> int:
        """Bytes per image of the columns that a layer's weight multiplies, in the two copies that unfolding takes."""
        positions = self.output[layer.node] // layer.shape[0]
        return 2 * positions * layer.groups * layer.shape[1:].numel()

    def numbers(self, node: fx.Node) -> int:
        """How many numbers an operation puts out for an image."""
        return self.output[node] // next(self.network.model.parameters()).element_size()

    def held_at(self, layer: Layer) -> int:
        """Bytes per image that a stream holds when it stands at a layer."""
        at, last_use = self.network.position[layer.node], self.network.last_use
        live = [n for n in self.network.nodes[:at] if last_use[n] >= at]
        return sum(self.output.get(n, 0) for n in live)

    def targets(self, layer: Layer, k_step: int) -> int:
        """Bytes per image of the features of a layer's window."""
        return sum(self.output[node] for node in Window(self.network, [layer], k_step).features)

    def moments(self, layers: Sequence[Layer]) -> int:
        """Bytes of the matrices that hold the second moment of a layer's inputs, and what it decomposes into."""
        return MATRICES * 8 * max(map(moment_size, layers))

    def vectors(self, layers: Sequence[Layer]) -> int:
        """Bytes of the vectors that the solver holds while it solves these layers at once."""
        size = sum(layer.shape.numel() for layer in layers)
        return VECTORS * size * next(self.network.model.parameters()).element_size()


def kept_for_derivative(network: Network, node: fx.Node, values: dict) -> int:
    """Bytes that the derivative of a node keeps besides its inputs and its output: slopes, attention weights."""
    if node.target is F.scaled_dot_product_attention:
        q, k = (values[each] for each in node.args[:2])
        weights = math.prod(q.shape[:-1]) * k.shape[-2] * q.element_size()
        return 3 * weights + 2 * nbytes(q)  # autograd's, the tangents' own, and one on the way; scaled q and k
    module, value = network.module(node), values[node]
    linear = node.target in LINEAR if module is None else any(True for _ in module.parameters())
    reads = [values[read] for read in node.all_input_nodes if isinstance(values.get(read), Tensor)]
    elementwise = isinstance(value, Tensor) and any(read.shape == value.shape for read in reads)
    return nbytes(value) if elementwise and not linear else 0  # the slope
