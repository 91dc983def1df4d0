"""The surviving weights of one layer: SNOWS's update, and layer-wise least squares, which is its case K = 0."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from snows.calibration.streams import Streams
from snows.errors import UsageError, listed
from snows.network.derivatives import explained
from snows.network.layers import Layer
from snows.options import Options
from snows.solve.cg import Operator, check_finite
from snows.solve.objective import Objective, reconstruction
from snows.solve.preconditioner import row_inverses
from snows.solve.solver import SolveStats, solve

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

# (objective, theta, support, preconditioner, options) -> (theta, what it took); as snows.solve.solver.solve
Solver = Callable[[Objective, Tensor, Tensor, Operator | None, Options], tuple[Tensor, SolveStats]]

# MP+ and the warm start: a layer's least squares on its support, which is the objective with K = 0 solved to the end.
LEAST_SQUARES = dict(
    sweeps=1,
    schedule=0,
    joint_steps=0,
    k_step=0,
    targets="same",
    curvature="ggn",
    newton_steps=1,
    curvature_images=0,
    batching=False,
    w_warm=False,
)
LEAST_SQUARES |= dict(biases=False, preconditioner="rows", max_CG_iterations=100, cg_tolerance=1e-4, damping=0.0)


@dataclass
class Update:
    """What becomes of a layer: its new weight, what is added to its bias (out,), and what that took."""

    weight: Tensor
    bias_update: Tensor | None = None
    stats: SolveStats = field(default_factory=SolveStats)


def update_layer(layer: Layer, mask: Tensor, streams: Streams, options: Options, solver: Solver = solve) -> Update:
    """Advance the streams to a layer and solve it on its support, from its masked weight; nothing is written back.

    Raises:
        Unsolvable: an operation after the layer has no derivative.
        UsageError: the solver gives back something else than a solution.
    """
    streams.advance(layer, options.targets)
    start, spent = streams.network.masked(layer, mask), SolveStats()
    if options.w_warm:
        warm = update_layer(layer, mask, streams, options.but(**LEAST_SQUARES))
        start, spent = warm.weight, warm.stats
    kept_bytes, counted = streams.kept_bytes([layer]), streams.samples.counted(layer, mask, options)
    objective = reconstruction([layer], streams.sparse, streams.dense, options, kept_bytes, streams.groups, counted)
    variables, precondition = objective.variables, None
    theta, support = variables.pack([start]), variables.pack([streams.samples.solvable(layer, mask, options)], True)
    options = options.but(recycle=streams.budget.recycled(options.recycle, theta.nbytes))
    with explained(objective.window):
        if options.preconditioner == "rows":
            precondition = row_inverses(objective, theta, support, options.seed, streams.budget.layer_inverses)
        theta, stats = minimise(objective, theta, support, precondition, options, solver)
    (weight,), (bias_update,) = variables.unpack(theta)
    stats.products, stats.cg_iterations = stats.products + spent.products, stats.cg_iterations + spent.cg_iterations
    return Update(weight, after_batch_norm(bias_update, objective.window.output_scale(layer)), stats)


def minimise(
    objective: Objective,
    start: Tensor,
    support: Tensor,
    precondition: Operator | None,
    options: Options,
    solver: Solver,
) -> tuple[Tensor, SolveStats]:
    """The solver's solution; the start, with a warning, where something is not finite.

    Raises:
        UsageError: the solver gives back something else than a solution.
    """
    names = listed(layer.name for layer in objective.window.layers)
    try:
        theta, stats = check_solution(solver(objective, start, support, precondition, options), start)
        check_finite(theta, "the solution")
    except FloatingPointError as error:
        alone = len(objective.window.layers) == 1
        log.warning(
            "%s: %s", f"layer {names} keeps its masked weights" if alone else "the layers keep their weights", error
        )
        return start, SolveStats(problem=str(error))
    if (theta != start)[~support].any():  # not the solver of this library
        theta = theta.where(support, start)
        stats.loss_after = objective.loss(theta).item()
        log.warning("the solver moved weights off the support of layer %s: they are set back", names)
    return theta, stats


def check_solution(solution: tuple[Tensor, SolveStats], start: Tensor) -> tuple[Tensor, SolveStats]:
    """Refuse what a solver gives back if it cannot be written where `start` was.

    Raises:
        UsageError: it is no pair of theta and SolveStats, or theta is of another shape, type or device.
    """
    pair = isinstance(solution, tuple) and len(solution) == 2
    if not (pair and isinstance(solution[0], Tensor) and isinstance(solution[1], SolveStats)):
        kinds = ", ".join(type(part).__name__ for part in solution) if pair else type(solution).__name__
        raise UsageError(f"the solver must return (theta, snows.solve.solver.SolveStats), not {kinds}.")
    got, wanted = (f"{tuple(w.shape)}, {w.dtype}, on {w.device}" for w in (solution[0], start))
    if got != wanted:
        raise UsageError(f"the solver must return a theta like the one that it is given ({wanted}), not {got}.")
    return solution


def after_batch_norm(update: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """An update of a layer's output as the bias after it sees it: a BatchNorm's comes after the scaling."""
    return update if update is None or scale is None else scale * update
