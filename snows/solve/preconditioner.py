"""A preconditioner that knows the support: the exact inverse of each output row's own curvature.

For a layer with weight W (out, in) and input columns x, the curvature of  sum_k c_k || J_k W x ||^2  is
sum_x (J^T C J) (x) x x^T. Keep of the metric J^T C J that the K steps after the layer pull back to its output only
the diagonal g, and the curvature splits into one block per output row i, restricted to that row's support S_i:

    B_i = g_i A[S_i, S_i],      A = sum_x x x^T.

Each block is damped, inverted once per layer and applied to the row's residual. Restricting before inverting is what
counts at high sparsity: the inverse of a whole Kronecker product restricted afterwards is a far worse preconditioner.
With K = 0 it is the exact inverse, up to its damping.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd import grad

from snows.budget import ALL_INVERSES, LAYER_INVERSES, common_cap, inverse_bytes, parts_within
from snows.memory import is_gpu
from snows.network.inputs import can_factor, layer_columns, moment_size, no_moment, second_moment
from snows.network.layers import Layer
from snows.solve.objective import Objective, Variables

ROWS_BYTES = 2**26  # of the rows that are inverted at a time
RELATIVE_DAMPING = 1e-3
SAMPLE = 256  # images that the moments are estimated from


class RowInverses:
    """r -> (g_i (A[S_i, S_i] + damping))^-1 r_i for every output row i: symmetric, positive definite on the support.

    moment: A, (groups, in, in). scale: g, (out,). mask: boolean, as the weight (out, in, ...).
    max_bytes: where the inverses of whole rows need more, each row is cut into blocks of its support (block Jacobi).
    """

    def __init__(
        self,
        moment: Tensor,
        scale: Tensor,
        mask: Tensor,
        damping: float = RELATIVE_DAMPING,
        max_bytes: int = LAYER_INVERSES,
    ):
        rows = mask.flatten(1)  # (out, in)
        self.scale = scale / scale.mean().clamp_min(torch.finfo(scale.dtype).tiny) + damping
        size = max(1, int(rows.sum(1).max()))  # an empty support has a padded column too
        # Row i's support, padded with columns off the support, which `kept` cancels.
        self.support = rows.int().argsort(dim=1, descending=True, stable=True)[:, :size]  # (out, size)
        self.kept = rows.gather(1, self.support).to(moment.dtype)  # (out, size): 1, or 0 where padded
        group = torch.arange(len(rows), device=mask.device) // (len(rows) // len(moment))
        self.magnitude = scale.mean() * moment.diagonal(dim1=1, dim2=2).mean()  # of the curvature, left out below
        moment = moment / moment.diagonal(dim1=1, dim2=2).mean().clamp_min(torch.finfo(moment.dtype).tiny)
        width = max(1, min(size, max_bytes // max(1, len(rows) * size * moment.element_size())))
        self.blocks = [
            (block, self._inverse(moment, group, block, damping))
            for block in (slice(start, start + width) for start in range(0, size, width))
        ]

    def _inverse(self, moment: Tensor, group: Tensor, block: slice, damping: float) -> Tensor:
        """(rows, width, width): the inverse of every row's block of A, the identity where it is padded."""
        support, kept = self.support[:, block], self.kept[:, block]
        rows, width = support.shape
        some = max(1, ROWS_BYTES // (width * width * moment.element_size()))  # rows at a time, for want of memory
        parts = [slice(start, start + some) for start in range(0, rows, some)]
        inverse = moment.new_empty(rows, width, width)
        identity = torch.eye(width, dtype=moment.dtype, device=moment.device)
        while True:
            failed = torch.zeros((), dtype=torch.bool, device=moment.device)
            for part in parts:
                columns, own = support[part], kept[part]
                matrix = moment[group[part, None, None], columns[:, :, None], columns[:, None, :]]
                matrix *= own[:, :, None] * own[:, None, :]
                matrix.diagonal(dim1=1, dim2=2).add_(1 - own)
                factor, info = torch.linalg.cholesky_ex(matrix + damping * identity)
                failed |= info.any()
                inverse[part] = inverse_of(factor)
            if not failed or not damping < 1:
                return inverse
            damping *= 10  # rounding made a nearly singular block indefinite

    def __call__(self, residual: Tensor) -> Tensor:
        rows = residual.view(len(self.support), -1)  # (out, in)
        held = rows.gather(1, self.support) * self.kept  # (out, size)
        parts = [torch.bmm(inverse, held[:, block, None])[..., 0] for block, inverse in self.blocks]
        solved = torch.cat(parts, dim=1) / self.scale[:, None] * self.kept
        return torch.zeros_like(rows).scatter_(1, self.support, solved).view_as(residual)


def inverse_of(factor: Tensor) -> Tensor:
    """(L L^T)^-1 of Cholesky factors L, (n, width, width): on a GPU in batches, where torch's own takes one by one."""
    if factor.device.type == "cpu":
        return torch.cholesky_inverse(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse.mT @ inverse


class JointInverses:
    """The preconditioner of many layers: each one's own, in the proportion of their curvatures.

    A layer whose inputs cannot be had is scaled by the others' mean curvature.
    """

    def __init__(self, variables: Variables, inverses: list[RowInverses | None]):
        self.variables = variables
        known = torch.stack([inverse.magnitude for inverse in inverses if inverse is not None])
        known = known.clamp_min(known.max() * 1e-6).clamp_min(torch.finfo(known.dtype).tiny)  # a dead layer's is zero
        usual, rest = known.log().mean().exp(), iter(known)
        self.blocks = [(inverse, usual if inverse is None else next(rest)) for inverse in inverses]

    def __call__(self, residual: Tensor) -> Tensor:
        parts = zip(self.variables.rows(residual), self.blocks, strict=True)
        solved = ((part if inverse is None else inverse(part)) / magnitude for part, (inverse, magnitude) in parts)
        return torch.cat([part.flatten() for part in solved])


def row_inverses(
    objective: Objective, theta: Tensor, support: Tensor, seed: int, max_bytes: int = LAYER_INVERSES
) -> RowInverses | None:
    """The preconditioner of an objective of one layer, at theta; None where its inputs cannot be had.

    Costs one unfolding of the layer's inputs and one backward pass, over a sample of the calibration set.
    """
    window, variables = objective.window, objective.variables
    if not can_factor(window.network, window.layers[0]):
        return None
    (weight,), _ = variables.unpack(theta)
    (mask,) = variables.rows(support)
    metric = output_metric(objective, weight, seed)
    return RowInverses(input_moment(objective), metric, mask, max_bytes=max_bytes)


def joint_inverses(
    objective: Objective, theta: Tensor, support: Tensor, seed: int, max_bytes: int = ALL_INVERSES
) -> JointInverses | None:
    """The preconditioner of an objective of many layers, at theta; None if no layer's inputs can be had.

    max_bytes: of all the layers' inverses together, and of the second moments that are held at a time.

    Costs what the inverses cost, and one forward and one backward pass of a sample of the images for each part of the
    layers whose second moments are held at a time.
    """
    window, variables, network = objective.window, objective.variables, objective.window.network
    factored = [layer for layer in window.layers if can_factor(network, layer)]
    if not factored:
        return None
    masks = {layer: mask.bool() for layer, mask in zip(window.layers, variables.rows(support))}
    needs = [min(LAYER_INVERSES, inverse_bytes(masks[layer], theta.element_size())) for layer in factored]
    cap, inverses = common_cap(needs, max_bytes), {}
    for part in parts_within([moment_size(layer, ones=True) * theta.element_size() for layer in factored], max_bytes):
        moments, metrics = curvature_factors(objective, theta, factored[part], seed)
        for layer in factored[part]:
            inverses[layer] = RowInverses(moments.pop(layer), metrics[layer], masks[layer], max_bytes=cap)
    return JointInverses(variables, [inverses.get(layer) for layer in window.layers])


def curvature_factors(
    objective: Objective, theta: Tensor, layers: list[Layer], seed: int
) -> tuple[dict[Layer, Tensor], dict[Layer, Tensor]]:
    """A (groups, in, in), a mean over the sample's positions, and g (out,) of layers of a window of many, at theta."""
    window, variables, network = objective.window, objective.variables, objective.window.network
    signs, group = Signs(objective, seed), objective.group
    with_bias, positions = dict(zip(window.layers, variables.with_bias)), dict.fromkeys(layers, 0)
    metrics = {layer: theta.new_zeros(layer.shape[0]) for layer in layers}
    moments = {layer: no_moment(layer, theta, with_bias[layer]) for layer in layers}
    for i in objective.own(objective.sample(SAMPLE)):
        with torch.enable_grad():
            parameters = window.parameters(*variables.unpack(theta.detach().requires_grad_()))
            values = window.run(window.nodes, objective.inputs(i), parameters)
        features = [values[node] for node in window.features]
        outputs = [values[layer.node] for layer in layers]
        for layer, pulled in zip(layers, pull_back(features, outputs, objective.coefficients, signs.of(i, features))):
            scale = window.output_scale(layer)
            pulled = by_channel(pulled, layer) * (1 if scale is None else scale)  # (positions, out)
            x = values[layer.node.args[0]].detach()
            metrics[layer] += pulled.square().sum(0)
            moments[layer] += second_moment(layer_columns(network, layer, x), with_bias[layer])
            positions[layer] += len(pulled)
    for layer in layers:
        metrics[layer], moments[layer] = group.sum(metrics[layer]), group.sum(moments[layer])
        moments[layer] /= group.count(positions[layer])
    return moments, metrics


def input_moment(objective: Objective) -> Tensor:
    """A: the sum of x x^T over sampled images and positions, (groups, in, in); x ends in 1 if biases are solved."""
    (layer,), (with_bias,), network = objective.window.layers, objective.variables.with_bias, objective.window.network
    total = no_moment(layer, network.model.get_parameter(layer.parameter), with_bias)
    for i in objective.own(objective.sample(SAMPLE)):
        x = objective.inputs(i)[layer.node.args[0]]
        total += second_moment(layer_columns(network, layer, x), with_bias)
    return objective.group.sum(total)


def output_metric(objective: Objective, weight: Tensor, seed: int) -> Tensor:
    """g: the diagonal of  sum_k c_k J_k^T J_k  with respect to the layer's output channels, (out,).

    Estimated with one probe of random signs u per image: the mean of (J^T C^1/2 u)^2 is that diagonal (Hutchinson).
    """
    window, signs, total = objective.window, Signs(objective, seed), weight.new_zeros(len(weight))
    for i in objective.own(objective.sample(SAMPLE)):
        values = objective.inputs(i)
        with torch.no_grad():
            output = window.output(values, weight)
        with torch.enable_grad():
            features = window.after(values, output.requires_grad_())
        (pulled,) = pull_back(features, [output], objective.coefficients, signs.of(i, features))
        del values, features, output  # before the next micro-batch's are computed
        total += by_channel(pulled, window.layers[0]).square().sum(0)
    return objective.group.sum(total)


def by_channel(output: Tensor, layer: Layer) -> Tensor:
    """A layer's output as (images and positions, out)."""
    channels_last = output.movedim(1, -1) if len(layer.shape) > 2 else output
    return channels_last.flatten(0, -2)


def pull_back(
    features: list[Tensor], outputs: list[Tensor], coefficients: list[float], signs: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """J^T C^1/2 u for random signs u, by each of the outputs that the features were computed from."""
    scaled = [u * c**0.5 for u, c in zip(signs, coefficients)]
    pairs = [(f, u) for f, u in zip(features, scaled) if f.requires_grad]
    return grad([f for f, _ in pairs], outputs, [u for _, u in pairs])


class Signs:
    """Random signs for the features of the sampled micro-batches: an image has the same whichever process holds it.

    They are drawn for all the images, in order; each process takes those of its own.
    """

    def __init__(self, objective: Objective, seed: int):
        self.generator, self.stream = generator_for(objective.device, seed), objective.examples.sparse
        self.to_come = objective.sample(SAMPLE)

    def of(self, index: int, features: list[Tensor]) -> Iterator[Tensor]:
        """Signs for each feature of a micro-batch; those of micro-batches before it, of others' images, are passed."""
        while (due := self.to_come.pop(0)) != index:
            for f in features:
                self._draw(f, index, due)
        for f in features:
            yield self._draw(f, index, index)

    def _draw(self, like: Tensor, index: int, due: int) -> Tensor:
        """Signs for what a feature of micro-batch `index` is in micro-batch `due`; a process's own where both agree."""
        images, own, shared = self.stream.sizes[due], len(self.stream.batches[index]), self.stream.shared
        if own == images or like.numel() % own:
            return random_signs(like, self.generator)
        drawn = random_signs(like.new_empty(()).expand(images, like.numel() // own), self.generator)
        return drawn[shared.own[index]].reshape(like.shape) if due == index else drawn


def generator_for(device: torch.device | str, seed: int) -> torch.Generator:
    """Random numbers where they are used, on a GPU; from the host for all else."""
    return torch.Generator(device if is_gpu(device) else "cpu").manual_seed(seed)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 with equal probability, shaped as a tensor and where it is; drawn as single bytes."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device=generator.device)
    return drawn.to(like.device).to(like.dtype).mul_(2).sub_(1)
