"""All the layers at once: the K-step objective of the whole line, whose unknown is every layer's support.

Layer by layer, each solution takes the layers behind it as they stand, and what they could make good together stays
undone. Here one Newton step moves all the surviving weights at a time: the features of every counted operation of the
line, the logits among them, are to match the dense network's. The loss, its products and the solver are those of a
single layer; a product costs a tangent pass and a backward pass of the whole network, for all of its layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snows.calibration.examples import Examples
from snows.calibration.streams import Streams
from snows.memory import ALL_BYTES, MAX_BYTES, common_cap, inverse_bytes
from snows.network.derivatives import explained
from snows.network.inputs import can_factor, second_moment
from snows.network.layers import Layer, Masks
from snows.network.trace import Values
from snows.network.window import Window
from snows.options import Options
from snows.solve.layer import behind_batch_norm, masked, minimised
from snows.solve.objective import Objective, with_shift, without_shift
from snows.solve.preconditioner import SAMPLE, RowInverses, by_channel, generator_for, pull_back
from snows.solve.solver import Preconditioner, Solution


class Line(Window):
    """The line behind the first of several layers, as a function of the weights and shifts of them all."""

    def direction(self, weights: list[Tensor], shifts: list[Tensor | None]) -> dict[str, Tensor]:
        moved = {}
        for layer, weight, shift in zip(self.layers, weights, shifts, strict=True):
            moved |= self.direction_of(layer, weight, shift)
        return moved


class JointObjective(Objective):
    """L of all the layers' weights, which are joined to one flat vector.

    The targets are computed when they are asked for, twice in a Newton step, and not kept: they would be features of
    every layer.
    """

    def __init__(self, layers: list[Layer], streams: Streams, options: Options):
        network, (first, *others) = streams.network, layers
        streams.fit(streams.plan.need(layers, len(network.nodes)))
        streams.restart()
        streams.advance(first, options.targets)
        sparse, dense = streams.sparse, streams.dense if options.targets == "dense" else streams.sparse
        window, teacher = (
            Line(network, first, len(network.nodes), model, others) for model in (network.model, streams.dense_model)
        )
        dense_weights = [streams.dense_model.get_parameter(layer.parameter) for layer in layers]

        def teach(values: Values) -> list[Tensor]:
            return teacher(teacher.enter(values), dense_weights, [None] * len(dense_weights))

        self.shifted = [options.biases and layer.bias is not None for layer in layers]
        examples = Examples(window, sparse, dense, teach, hold=False)
        super().__init__(examples, options.but(curvature_images=options.joint_images), streams.kept_bytes(layers))

    def join(self, weights: list[Tensor], shift: float | Tensor = 0.0) -> Tensor:
        """The unknown made of all the layers' weights (or masks), with one value for all their shifts."""
        parts = [with_shift(w, shift) if shifted else w for w, shifted in zip(weights, self.shifted, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    def parts(self, unknown: Tensor) -> list[Tensor]:
        """The unknown of each layer: its weight, or (out, in + 1) with the shifts in the last column."""
        shapes = [
            (layer.shape[0], layer.shape[1:].numel() + 1) if shifted else layer.shape
            for layer, shifted in zip(self.window.layers, self.shifted)
        ]
        parts = unknown.split([torch.Size(shape).numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]

    def split(self, unknown: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """(weights, shifts) of the layers, in order."""
        pairs = [
            without_shift(part, layer) if shifted else (part, None)
            for part, layer, shifted in zip(self.parts(unknown), self.window.layers, self.shifted)
        ]
        weights, shifts = zip(*pairs)
        return list(weights), list(shifts)


class LayerInverses:
    """The preconditioner of all the layers: each one's own, in the proportion of their curvatures.

    A layer whose inputs cannot be had is scaled by the others' mean curvature.
    """

    def __init__(self, objective: JointObjective, inverses: list[RowInverses | None]):
        self.objective = objective
        known = torch.stack([inverse.magnitude for inverse in inverses if inverse is not None])
        known = known.clamp_min(known.max() * 1e-6).clamp_min(torch.finfo(known.dtype).tiny)  # a dead layer's is zero
        usual, rest = known.log().mean().exp(), iter(known)
        self.blocks = [(inverse, usual if inverse is None else next(rest)) for inverse in inverses]

    def __call__(self, residual: Tensor) -> Tensor:
        parts = zip(self.objective.parts(residual), self.blocks, strict=True)
        solved = ((part if inverse is None else inverse(part)) / magnitude for part, (inverse, magnitude) in parts)
        return torch.cat([part.flatten() for part in solved])


def layer_inverses(
    objective: JointObjective, unknown: Tensor, mask: Tensor, seed: int, max_bytes: int = ALL_BYTES
) -> Preconditioner | None:
    """The preconditioner at `unknown`; None if no layer's inputs can be had.

    max_bytes: of all the layers' inverses together.

    Costs one forward and one backward pass of a sample of the images, for all the layers, and what inverses cost.
    """
    window, generator = objective.window, generator_for(objective.device, seed)
    network = window.network
    factored = [layer for layer in window.layers if can_factor(network, layer)]
    if not factored:
        return None
    moments, scales, positions = (dict.fromkeys(window.layers, 0.0) for _ in range(3))
    shifted = dict(zip(window.layers, objective.shifted))
    for i in objective.sample(SAMPLE):
        values = objective.inputs(i)
        with torch.enable_grad():
            parameters = window.parameters(*objective.split(unknown.detach().requires_grad_()))
            values = window.run(window.nodes, values, parameters)
        features = [values[node] for node in window.features]
        outputs = [values[layer.node] for layer in factored]
        for layer, pulled in zip(factored, pull_back(features, outputs, objective.coefficients, generator)):
            scale = window.output_scale(layer)
            pulled = by_channel(pulled, layer) * (1 if scale is None else scale)
            module, x = network.module(layer.node), values[layer.node.args[0]].detach()
            scales[layer] += pulled.square().sum(0)
            moments[layer] += second_moment(module, x, shifted[layer])
            positions[layer] += len(pulled)
    supports = {layer: support.bool() for layer, support in zip(window.layers, objective.parts(mask))}
    needs = [min(MAX_BYTES, inverse_bytes(supports[layer], unknown.element_size())) for layer in factored]
    cap = common_cap(needs, max_bytes)
    inverses = {
        layer: RowInverses(moments.pop(layer) / positions[layer], scales[layer], supports[layer], max_bytes=cap)
        for layer in factored
    }
    return LayerInverses(objective, [inverses.get(layer) for layer in window.layers])


def solve_jointly(
    layers: list[Layer], masks: Masks, streams: Streams, solver: Callable[..., Solution], options: Options
) -> tuple[Solution, tuple[list[Tensor], list[Tensor | None]]]:
    """(what it took, (the layers' weights, the shifts of their biases)); nothing is written back."""
    objective = JointObjective(layers, streams, options)
    start = objective.join([masked(streams.network, layer, masks[layer.name]) for layer in layers])
    support = objective.join([masks[layer.name] for layer in layers], True)
    options = options.but(
        newton_steps=options.joint_steps, max_CG_iterations=options.joint_CG_iterations, batching=False
    )
    with explained(objective.window):
        rows = options.preconditioner == "rows"
        room = streams.budget.inverses(ALL_BYTES)
        precondition = layer_inverses(objective, start, support, options.seed, room) if rows else None
        solution = minimised(objective, start, support, precondition, options, solver, "the layers keep their weights")
    weights, shifts = objective.split(solution.weight)
    scales = [objective.window.output_scale(layer) for layer in layers]
    return solution, (weights, [behind_batch_norm(shift, scale) for shift, scale in zip(shifts, scales)])
