"""Whether the trace computes what the model does, and its windows what the trace does: asked with a few images.

A trace may have frozen what a weight decides, and a window replaces modules by what they are known to compute. Both are
right at the weights that they were made at sooner than at others; so the weights are moved, by noise, and

    the model's own logits   are compared with   those of the trace,              all layers' weights moved;
    the trace's values       with                those of each layer's window,    the layer's weight and bias moved;
    their tangents           with                those of the window's tangent pass.

A window that fails is asked again in float64, where rounding turns no activation on or off. One that fails there too
calls its BatchNorms as they are; a layer for which that does not help is left dense.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from snows.calibration.stream import Stream, channels_last_on_cpu
from snows.errors import TraceError, UsageError, first_line, listed
from snows.memory import is_out_of_memory
from snows.network.known import has_activation
from snows.network.layers import Layer
from snows.network.logits import logits_of
from snows.network.network import Network
from snows.network.tangent import Tangents, dual, tangent_of
from snows.network.trace import Values, run_node
from snows.network.window import Window, differentiable

log = logging.getLogger("snows")

IMAGES = 2  # that the weights are moved with
MOVE = 0.3  # in units of a weight's root mean square
TOLERANCE = 1e-2  # relative error: above rounding, even to a GPU's TF32, and below what any fault made
OTHER = "its weight decides something in the model that the trace has frozen"
WINDOW = "what comes after it computes something else in the window than in the model"


@torch.no_grad()
def check_trace(network: Network, images: Tensor, k_step: int) -> None:
    """Compare the trace with the model, first as it is, then with other weights, then window by window.

    Layers that cannot be followed are refused by `network`, with a warning. What has been compared is not again.

    Raises:
        UsageError: the images do not run through the model. TraceError: the trace does not run, or computes something
            else as it is.
    """
    if network.checked == (k_step, images.shape, images.dtype):
        return
    try:
        own = as_it_came(network, images, {})
    except Exception as error:  # whatever the model raises of images that are not its own
        shape = "x".join(map(str, images.shape[1:]))
        raise UsageError(f"calibration images of {shape} do not run through the model: {first_line(error)}") from error
    try:
        traced = run_trace(network, images, {})
    except Exception as error:  # whatever torch raises of an operation that needs what was not recorded
        if is_out_of_memory(error):
            raise
        raise TraceError(f"the traced model does not run as the model does: {first_line(error)}") from error
    smallest = torch.finfo(own.dtype).tiny  # numbers below have few digits, or none
    tolerance = max(1e-3 * own.nan_to_num(0, 0, 0).abs().max().item(), smallest)
    if not torch.allclose(traced, own, rtol=1e-3, atol=tolerance, equal_nan=True):
        if random := drawn_at_random(network, images):
            raise TraceError(
                f"the model gives the same images other logits each time, in evaluation mode too: {listed(random)}. "
                f"Dropout must be told whether the module is training: F.dropout(x, p, self.training)."
            )
        raise TraceError(
            "the traced model computes something else than the model: its forward pass depends on data, or writes into "
            "a view of a value that it reads again."
        )
    try:
        check_weights(network, images[:IMAGES])
        check_windows(network, images[:IMAGES], k_step)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        log.warning("no memory to check the windows of the layers with %d images: going on unchecked", IMAGES)
    else:
        network.checked = (k_step, images.shape, images.dtype)


def as_it_came(network: Network, images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The logits of the model with its in-place modules as they were before the trace, at other weights."""
    modules = [network.model.get_submodule(name) for name in network.in_place]
    for module in modules:
        module.inplace = True
    try:
        return logits_of(functional_call(network.model, weights, (images.clone(),)))
    finally:
        for module in modules:
            module.inplace = False


def run_trace(network: Network, images: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The logits as the trace computes them; notes which counted nodes return something else than a tensor."""
    values: Values = {network.input: channels_last_on_cpu(images, images.device)}
    for node in network.walk(network.nodes[1:-1], network.model, values, weights):
        if network.is_counted(node) and not is_feature(values[node]):
            network.pairs.add(node)
    return values[network.output]


def drawn_at_random(network: Network, images: Tensor) -> list[str]:
    """The operations that compute something else when they are run again on the same values."""
    values: Values = {network.input: images}
    found = []
    for node in network.nodes[1:-1]:
        first, again = (run_node(node, network.model, values, {}) for _ in range(2))
        values[node] = first
        pairs = zip(tree_leaves(first), tree_leaves(again))
        if any(is_feature(one) and not torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs):
            module = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())[-1][0]
            found.append(f"{name_of(node)} in {module or 'the model'}")
    return found


def is_feature(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check_weights(network: Network, images: Tensor) -> None:
    """Refuse the layers whose weights (and biases) the trace does not follow as the model does."""
    generator = torch.Generator().manual_seed(0)
    moves = {layer.name: moved(network, (layer.parameter, layer.bias), generator) for layer in network.layers}

    def follows(weights: dict[str, Tensor]) -> bool:
        return same(run_trace(network, images, weights), as_it_came(network, images, weights))

    if follows({name: weight for weights in moves.values() for name, weight in weights.items()}):
        return
    for name, weights in moves.items():
        if not follows(weights):
            refuse(network, name, OTHER)


def check_windows(network: Network, images: Tensor, k_step: int) -> None:
    """Let windows that fail call their BatchNorms as they are; refuse the layers for which that does not help."""
    stream = Stream(network, network.model, [images], images.device)
    for name in [layer.name for layer in network.layers]:
        if not (window_holds(network, name, k_step, stream) or holds_in_float64(network, name, k_step, images)):
            window = Window(network, [find(network, name)], k_step)
            replaced = network.affine.intersection([*window.nodes, *window.folded.values()])
            network.call_as_it_is(replaced)
            if replaced:
                names = listed(sorted({name_of(node) for node in replaced}))
                log.warning("layer %s: %s; its BatchNorms are called as they are: %s", name, WINDOW, names)
            if not replaced or not window_holds(network, name, k_step, stream):
                refuse(network, name, WINDOW)


def find(network: Network, name: str) -> Layer:
    return next(layer for layer in network.layers if layer.name == name)


def refuse(network: Network, name: str, reason: str) -> None:
    log.warning("layer %s is left dense: %s", name, reason)
    network.refuse(name, reason)


def window_holds(network: Network, name: str, k_step: int, stream: Stream) -> bool:
    """Whether a layer's window, and its tangent pass, compute what the trace does with its weight and bias moved."""
    layer, generator = find(network, name), torch.Generator().manual_seed(1)
    stream.advance(layer.node)
    values, window = stream[0], Window(network, [layer], k_step)
    weight = noise(network.model.get_parameter(layer.parameter), generator)
    update, moves = None, {layer.parameter: weight}
    if layer.bias is not None:
        bias, scale = network.model.get_parameter(layer.bias), window.output_scale(layer)
        update = noise(bias, generator)
        moves[layer.bias] = update if scale is None else scale * update
    at = {name: network.model.get_parameter(name) + move for name, move in moves.items()}
    parameters = window.parameters([at[layer.parameter]], [update])
    found = window.run(window.nodes, window.enter(values), parameters)
    plain = through(window, values, at)
    if not all(same(found[node], plain[stands_for(window, node)]) for node in window.nodes if is_told(window, node)):
        return False
    try:
        tangents = Tangents(window, found, parameters)([weight], [update])
        with differentiable(), forward_mode.dual_level():
            plain = through(window, values, {name: dual(at[name], moves[name]) for name in at})
            wanted = {node: tangent_of(plain[stands_for(window, node)]) for node in window.features}
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return True  # the solver says which operation has no derivative, if it needs one
    told = ((tangent, node) for tangent, node in zip(tangents, window.features) if is_told(window, node))
    return all(same(or_zeros(tangent, found[node]), or_zeros(wanted[node], found[node])) for tangent, node in told)


def holds_in_float64(network: Network, name: str, k_step: int, images: Tensor) -> bool:
    """Whether a window that failed holds but for rounding: one activation that it turns on or off is felt behind."""
    exact = network.copy()
    exact.model.double()
    try:
        return window_holds(exact, name, k_step, Stream(exact, exact.model, [images.double()], images.device))
    except Exception:  # whatever the model, or its device, raises of float64: nothing speaks for the window
        return False


def through(window: Window, values: Values, parameters: dict[str, Tensor]) -> Values:
    """What every node of the trace up to a window's end computes from the values at the cut, each called as it is."""
    network, values = window.network, dict(values)
    position = network.position.__getitem__
    end = max(position(stands_for(window, node)) for node in window.nodes)
    for node in network.nodes[1 : end + 1]:
        if node.op == "get_attr" or position(node) >= position(window.layers[0].node):
            values[node] = run_node(node, network.model, values, parameters)
    return values


def stands_for(window: Window, node: fx.Node) -> fx.Node:
    """The node of the trace whose value a window's node has: the BatchNorm's, where it is folded into a convolution."""
    return window.folded.get(node, node)


def is_told(window: Window, node: fx.Node) -> bool:
    """Whether a window's value can be had from the trace.

    Not that between a BatchNorm and its own activation, nor a weight that a BatchNorm is folded into.
    """
    if node.op == "get_attr":
        return False
    return node not in window.folded or not has_activation(window.norm(window.folded[node]))


def name_of(node: fx.Node) -> str:
    """What a warning calls a node."""
    return node.target if isinstance(node.target, str) else node.name


def moved(network: Network, names: tuple[str | None, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters of the model with noise added."""
    tensors = {name: network.model.get_parameter(name) for name in names if name is not None}
    return {name: tensor + noise(tensor, generator) for name, tensor in tensors.items()}


def noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    size = tensor.square().mean().sqrt()
    size = size.where(size > 0, 1.0)
    return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor) * (MOVE * size)


def or_zeros(tangent: Tensor | None, feature: Tensor) -> Tensor:
    """A tangent, None being that of what does not depend on the weight."""
    return torch.zeros_like(feature) if tangent is None else tangent


def same(found: Any, wanted: Any) -> bool:
    """Whether two values agree but for rounding; where one is not finite in the trace either, nothing can be told."""
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    told = ((ours, own) for ours, own in pairs if is_feature(own) and own.isfinite().all())
    return all(ours.shape == own.shape and bool((ours - own).norm() <= TOLERANCE * own.norm()) for ours, own in told)
