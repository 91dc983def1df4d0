"""How the surviving weights are set: the methods that `algo` names, as a table. A fifth method is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from snows.calibration.streams import Streams
from snows.masks import sparsegpt
from snows.masks.saliency import mean_moment
from snows.network.layers import Layer, Masks
from snows.options import Options
from snows.solve.joint import update_jointly
from snows.solve.layer import LEAST_SQUARES, Solver, Update, update_layer
from snows.solve.solver import solve


@dataclass(frozen=True)
class Method:
    """How the surviving weights of a layer are set.

    update: (layer, mask, streams, options) -> the layer's `Update`, from its weight in `streams.network` and from the
        images, of which `streams` holds the features; it writes nothing. None: the weights stay as they are.
    update_jointly: (layers, masks, streams, options) -> an `Update` of each layer, in the joint steps after the last
        sweep; None: there are none.
    fixed: the options that the method decides itself.
    inverts_inputs: it needs the inverse of the second moment of every layer's inputs.
    """

    update: Callable[[Layer, Tensor, Streams, Options], Update] | None = None
    update_jointly: Callable[[list[Layer], Masks, Streams, Options], list[Update]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inverts_inputs: bool = False

    def settle(self, options: Options) -> Options:
        """The options as this method takes them."""
        return options.but(**{**({} if self.update_jointly else {"joint_steps": 0}), **self.fixed})


def snows_with(solver: Solver = solve) -> Method:
    """SNOWS; `solver` minimises the K-step loss, with the arguments and the result of snows.solve.solver.solve."""
    return Method(partial(update_layer, solver=solver), partial(update_jointly, solver=solver))


def update_by_sparsegpt(layer: Layer, mask: Tensor, streams: Streams, options: Options) -> Update:
    """SparseGPT's own update of the surviving weights, on any mask; none from too few samples."""
    if not streams.samples.solvable(layer, mask, options).any():
        return Update(streams.network.masked(layer, mask))
    return Update(sparsegpt.update(*layer_problem(layer, streams), mask))


def layer_problem(layer: Layer, streams: Streams) -> tuple[Tensor, Tensor]:
    """(weight, second moment of its inputs) of a layer on the pruned network as it stands."""
    streams.sparse.advance(layer.node)
    weight = streams.network.model.get_parameter(layer.parameter).detach()
    return weight, mean_moment(layer, streams.sparse)


ONE_PASS = dict(sweeps=1, schedule=0, joint_steps=0)
METHODS = {
    "SNOWS": snows_with(),
    "MP": Method(fixed=ONE_PASS),
    "MP+": Method(update_layer, fixed=LEAST_SQUARES),
    "SparseGPT": Method(update_by_sparsegpt, fixed=ONE_PASS, inverts_inputs=True),
}
