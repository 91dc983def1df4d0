"""The surviving weights of one layer, in the way that was asked for; SNOWS is one of the ways."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from snows.calibration.streams import Streams
from snows.errors import UsageError, listed
from snows.masks.saliency import mean_moment
from snows.masks.sparsegpt import update
from snows.memory import MAX_BYTES
from snows.network.derivatives import explained
from snows.network.inputs import can_factor
from snows.network.layers import Layer, Network
from snows.options import Options
from snows.solve.objective import Objective, reconstruction
from snows.solve.preconditioner import row_inverses
from snows.solve.solver import Preconditioner, Solution, check_finite, solve

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr

ALGORITHMS = ("SNOWS", "MP", "MP+", "SparseGPT")
# MP+ and --w_warm: each layer's least squares on its support, which is the objective with K = 0 solved to the end.
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
SETTLED = {
    "MP": dict(sweeps=1, schedule=0, joint_steps=0),
    "MP+": LEAST_SQUARES,
    "SparseGPT": dict(sweeps=1, schedule=0, joint_steps=0),
}  # options of each


@dataclass(frozen=True)
class Way:
    """How the layers are set (`algo`, with what solver), and whether each one's mask is chosen when it is its turn."""

    algo: str
    solver: Callable[..., Solution]
    sequential: bool


def set_layer(layer: Layer, mask: Tensor, streams: Streams, way: Way, options: Options) -> Solution:
    """A layer's surviving weights, in the way that was asked for."""
    match way.algo:
        case "MP":
            return Solution(masked(streams.network, layer, mask))
        case "SparseGPT":
            return Solution(update(*sparsegpt_problem(layer, streams), mask))
        case _:
            return solve_layer(layer, mask, streams, options, way.solver)


def solve_layer(
    layer: Layer, mask: Tensor, streams: Streams, options: Options, solver: Callable[..., Solution]
) -> Solution:
    """Advance the streams to a layer and solve it on its support, from its masked weight; nothing is written back.

    Raises:
        Unsolvable: an operation behind the layer has no derivative.
        UsageError: the solver gives back something else than a solution.
    """
    streams.advance(layer, options.targets)
    start = Solution(masked(streams.network, layer, mask))
    if options.w_warm:
        start = solve_from(start, layer, mask, streams, options.but(**LEAST_SQUARES), solve)
    return solve_from(start, layer, mask, streams, options, solver)


def solve_from(
    start: Solution, layer: Layer, mask: Tensor, streams: Streams, options: Options, solver: Callable[..., Solution]
) -> Solution:
    """Solve a layer, at which both streams stand, from a weight on its support."""
    objective = reconstruction(
        layer, streams.sparse, streams.dense, options, streams.kept_bytes([layer]), streams.groups
    )
    unknown, support = objective.join(start.weight), objective.join(mask, True)
    precondition, kept = None, f"layer {layer.name} keeps its masked weights"
    with explained(objective.window):
        if options.preconditioner == "rows" and can_factor(streams.network, layer):
            precondition = row_inverses(objective, unknown, support, options.seed, streams.budget.inverses(MAX_BYTES))
        solution = minimised(objective, unknown, support, precondition, options, solver, kept)
    solution.products += start.products
    solution.cg_iterations += start.cg_iterations
    solution.weight, shift = objective.split(solution.weight)
    solution.shift = behind_batch_norm(shift, objective.window.output_scale(layer))
    return solution


def minimised(
    objective: Objective,
    start: Tensor,
    support: Tensor,
    precondition: Preconditioner | None,
    options: Options,
    solver: Callable[..., Solution],
    otherwise: str,
) -> Solution:
    """The solver's solution; the start, and a line that says `otherwise`, where something is not finite."""
    try:
        solution = solver(
            objective,
            start,
            support,
            precondition,
            newton_steps=options.newton_steps,
            max_CG_iterations=options.max_CG_iterations,
            cg_tolerance=options.cg_tolerance,
            damping=options.damping,
            batching=options.batching,
        )
        check_solution(solution, start)
        check_finite(solution.weight, "the solution")
    except FloatingPointError as error:
        log.warning("%s: %s", otherwise, error)
        return Solution(start, problem=str(error))
    if solution.weight[~support].any():  # not the solver of this library
        solution.weight = solution.weight.where(support, 0)
        solution.loss_after = objective.loss(solution.weight).item()
        names = listed(layer.name for layer in objective.window.layers)
        log.warning("the solver moved removed weights of layer %s: they are set back to zero", names)
    return solution


def check_solution(solution: Solution, start: Tensor) -> None:
    """Refuse what a solver gives back if it cannot be written where `start` was.

    Raises:
        UsageError: it is no Solution, or its weight is of another shape, type or device.
    """
    if not isinstance(solution, Solution) or not isinstance(solution.weight, Tensor):
        raise UsageError(f"the solver must return a snows.solve.solver.Solution, not {type(solution).__name__}.")
    got, wanted = (f"{tuple(w.shape)}, {w.dtype}, on {w.device}" for w in (solution.weight, start))
    if got != wanted:
        raise UsageError(f"the solver must return a weight like the one that it is given ({wanted}), not {got}.")


def behind_batch_norm(shift: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """A shift of a layer's output as the bias behind it sees it: a BatchNorm's comes after the scaling."""
    return shift if shift is None or scale is None else scale * shift


def sparsegpt_problem(layer: Layer, streams: Streams) -> tuple[Tensor, Tensor]:
    """(weight, second moment of its inputs) of a layer on the pruned network as it stands."""
    streams.sparse.advance(layer.node)
    return streams.network.model.get_parameter(layer.parameter), mean_moment(layer, streams.sparse)


def masked(network: Network, layer: Layer, mask: Tensor) -> Tensor:
    """A layer's weight where its mask keeps it, else zero, even where it was NaN."""
    return network.model.get_parameter(layer.parameter).where(mask, 0)
