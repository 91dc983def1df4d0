"""What each weight is worth to the network as it stands: the scores by which a pattern chooses masks.

    MP         |w|                               magnitude
    Wanda      |w_ij| ||x_j||                    with the size of the input that it multiplies (Sun et al. 2024)
    SparseGPT  w_ij^2 / [A^-1]_jj                the layer's own least loss without the weight (Frantar, Alistarh 2023)
    ALPS       |w|, of which only follows how many weights a layer loses: its masks are by ADMM (snows/masks/alps.py)
    OBS        w_ij^2 g_i A_jj / 2               what the K-step loss rises by when the weight is removed

x_j is input column j of the layer and A the mean of x x^T over images and positions. OBS takes the curvature of the
K-step loss as the preconditioner splits it, B_i = g_i A for output row i, and of that its diagonal: dividing by the
diagonal of the inverse instead, as if the row's other weights made up for the loss, gave no better masks here. All but
MP need the inputs of every layer, of a layer that is called more than once those of its first call: one pass of a
stream along the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from snows.calibration.stream import Stream
from snows.errors import Unsolvable, UsageError, listed
from snows.masks import alps
from snows.masks.patterns import NM, Unstructured
from snows.masks.sparsegpt import choose_mask, damped_inverse
from snows.network.derivatives import explained
from snows.network.inputs import MAX_INPUTS, can_factor, layer_columns, no_moment, second_moment, shows_inputs
from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.trace import value_of
from snows.options import Options
from snows.solve.objective import reconstruction
from snows.solve.preconditioner import output_metric

AnyPattern = TypeVar("AnyPattern", bound=Unstructured | NM)


@dataclass(frozen=True)
class Saliency:
    """What a weight is worth, and how a pattern compares it with others.

    score: (layer, stream, options) -> the scores of the layer's weights, of the weight's shape, the stream standing at
        the layer; None: the weights themselves.
    layer_wise: the scores are in units of the layer's own output: across layers they compare as shares only.
    by_row: an unstructured pattern compares the weights of one output row, each of which loses the same number.
    choose: (weight, second moment of its inputs, N:M or how many are removed, what is zero all the same) -> mask, of
        each layer when it is its turn, from the network as it stands; until then the pattern only says how many weights
        the layer loses.
    looks_ahead: the scores look at the K operations after the layer.
    """

    score: Callable[[Layer, Stream, Options], Tensor] | None = None
    layer_wise: bool = False
    by_row: bool = False
    choose: Callable[[Tensor, Tensor, NM | int, Tensor | None], Tensor] | None = None
    looks_ahead: bool = False


def comparing(pattern: AnyPattern, saliency: Saliency) -> AnyPattern:
    """A pattern that says how scores compare across layers: as shares, where they are in units of each layer's own."""
    if isinstance(pattern, Unstructured) and pattern.normalise is None:
        return replace(pattern, normalise=saliency.layer_wise)
    return pattern


def scores(saliency: Saliency, layers: list[Layer], stream: Stream, options: Options) -> dict[str, Tensor]:
    """Layer name -> the score of each weight; the stream stands at the start of the network."""
    result = {}
    for layer in layers:
        stream.advance(layer.node)
        if saliency.score is not None:
            result[layer.name] = saliency.score(layer, stream, options)
    return result


def check_inputs(method: str, layers: list[Layer], network: Network, inverse: bool) -> None:
    """Refuse layers whose input columns, which a method needs, cannot be had; with `inverse`, or are too many for that.

    Raises:
        UsageError: it lists them.
    """
    hidden = [layer.name for layer in layers if not shows_inputs(network, layer)]
    wide = [layer.name for layer in layers if not can_factor(network, layer)] if inverse else []
    for names, problem in ((hidden, "cannot be unfolded"), (wide, f"are more than {MAX_INPUTS}")):
        if names:
            raise UsageError(
                f"{method} needs the inputs of every layer, and those of {listed(names)} {problem}. "
                f"Leave these layers dense (`layers`), or choose another method."
            )


def wanda(layer: Layer, stream: Stream, options: Options) -> Tensor:
    """|w_ij| times the root mean square of input column j, so that layers of any number of positions compare."""
    return weight_of(layer, stream).abs() * by_weight(layer, mean_squares(layer, stream).sqrt())


def sparsegpt(layer: Layer, stream: Stream, options: Options) -> Tensor:
    """w_ij^2 / [A^-1]_jj: by how much the error of the layer's own output rises if its other weights make up for it."""
    inverse = damped_inverse(mean_moment(layer, stream)).diagonal(dim1=1, dim2=2)
    return weight_of(layer, stream).square() / by_weight(layer, inverse)


def obs(layer: Layer, stream: Stream, options: Options) -> Tensor:
    """w_ij^2 g_i A_jj / 2, g_i being what the K steps after the layer make of its output i."""
    objective = reconstruction([layer], stream, stream, options.but(targets="same", biases=False))
    weight = weight_of(layer, stream)
    with explained(objective.window):
        metric = output_metric(objective, weight, options.seed)  # g, (out,)
    diagonal = by_weight(layer, mean_squares(layer, stream))
    return weight.square() * diagonal * metric.view(-1, *[1] * (weight.ndim - 1)) / 2


SALIENCIES = {  # by the name that `mask_alg` knows it by; another one is one more entry
    "MP": Saliency(),
    "Wanda": Saliency(wanda, layer_wise=True, by_row=True),
    "SparseGPT": Saliency(sparsegpt, layer_wise=True, choose=choose_mask),
    "ALPS": Saliency(choose=alps.choose_mask),
    "OBS": Saliency(obs, looks_ahead=True),
}


def weight_of(layer: Layer, stream: Stream) -> Tensor:
    return stream.model.get_parameter(layer.parameter)


def inputs(layer: Layer, stream: Stream) -> Iterator[Tensor]:
    """The layer's input columns of each of this process's micro-batches, (groups, in, positions)."""
    source = layer.node.args[0]
    for i in stream.own:
        x = value_of(source, stream.model, stream.read(i, {source}), {})
        yield layer_columns(stream.network, layer, x)


def mean_squares(layer: Layer, stream: Stream) -> Tensor:
    """The diagonal of A, (groups, in); the stream stands at the layer."""
    total, count = weight_of(layer, stream).new_zeros(layer.groups, layer.shape[1:].numel()), 0
    for x in inputs(layer, stream):
        total, count = total + x.square().sum(2), count + x.shape[2]
    return checked(stream.group.sum(total) / stream.group.count(count), layer)


def mean_moment(layer: Layer, stream: Stream) -> Tensor:
    """A, the mean of x x^T over images and positions, (groups, in, in) in float64; the stream stands at the layer."""
    total, count = no_moment(layer, weight_of(layer, stream)).double(), 0
    for x in inputs(layer, stream):
        total, count = total + second_moment(x).double(), count + x.shape[2]
    return checked(stream.group.sum(total) / stream.group.count(count), layer)


def checked(statistic: Tensor, layer: Layer) -> Tensor:
    """The statistic, if it is finite.

    Raises:
        Unsolvable: it is not.
    """
    if not statistic.isfinite().all():
        raise Unsolvable(f"the inputs of layer {layer.name} hold NaN or infinity.", "its inputs hold NaN or infinity")
    return statistic


def by_weight(layer: Layer, by_column: Tensor) -> Tensor:
    """A number per input column (groups, in), spread out to the weight's shape."""
    return by_column.repeat_interleave(layer.shape[0] // len(by_column), dim=0).view(layer.shape)
