"""All the layers at once: the K-step objective of the rest of the network, whose variables are every layer's support.

Layer by layer, each solution takes the layers after it as they stand, and what they could make good together stays
undone. Here one Newton step moves all the surviving weights at a time: the features of every counted operation, the
logits among them, are to match the dense network's. The loss, its products and the solver are those of a single layer;
a product costs a tangent pass and a backward pass of the whole network, for all of its layers.
"""

from __future__ import annotations

from snows.calibration.streams import Streams
from snows.network.derivatives import explained
from snows.network.layers import Layer, Masks
from snows.options import Options
from snows.solve.layer import Solver, Update, after_batch_norm, minimise
from snows.solve.objective import Objective, reconstruction
from snows.solve.preconditioner import joint_inverses
from snows.solve.solver import solve


def joint_objective(layers: list[Layer], streams: Streams, options: Options) -> Objective:
    """L of all the layers' weights; the streams are left at the first layer."""
    streams.restart()
    streams.advance(layers[0], options.targets)
    options = options.but(k_step=len(streams.network.nodes), curvature_images=options.joint_images)
    return reconstruction(layers, streams.sparse, streams.dense, options, streams.kept_bytes(layers))


def update_jointly(
    layers: list[Layer], masks: Masks, streams: Streams, options: Options, solver: Solver = solve
) -> list[Update]:
    """An update of each layer; what it took is that of all of them together. Nothing is written back.

    Raises:
        Unsolvable: an operation after the first layer has no derivative.
        UsageError: the solver gives back something else than a solution.
    """
    objective, precondition = joint_objective(layers, streams, options), None
    variables, window = objective.variables, objective.window
    theta = variables.pack([streams.network.masked(layer, masks[layer.name]) for layer in layers])
    support = variables.pack([streams.samples.solvable(layer, masks[layer.name], options) for layer in layers], True)
    options = options.but(
        newton_steps=options.joint_steps, max_CG_iterations=options.joint_CG_iterations, batching=False,
        recycle=streams.budget.recycled(options.recycle, theta.nbytes),
    )  # fmt: skip
    with explained(window):
        if options.preconditioner == "rows":
            precondition = joint_inverses(objective, theta, support, options.seed, streams.budget.all_inverses)
        theta, stats = minimise(objective, theta, support, precondition, options, solver)
    return [
        Update(weight, after_batch_norm(update, window.output_scale(layer)), stats)
        for layer, weight, update in zip(layers, *variables.unpack(theta), strict=True)
    ]
