"""A preconditioner that knows the support: the exact inverse of each output row's own curvature.

For a layer with weight W (out, in) and input columns x, the curvature of  sum_k c_k || J_k W x ||^2  is
sum_x (J^T C J) (x) x x^T. Keep of the metric J^T C J that the K steps behind the layer pull back to its output only
the diagonal g, and the curvature splits into one block per output row i, restricted to that row's support S_i:

    B_i = g_i A[S_i, S_i],      A = sum_x x x^T.

Each block is damped, inverted once per layer and applied to the row's residual. Restricting before inverting is what
counts at high sparsity: the inverse of a whole Kronecker product restricted afterwards is a far worse preconditioner.
With K = 0 it is the exact inverse, up to its damping.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import grad

from snows.memory import MAX_BYTES, is_gpu
from snows.network.inputs import second_moment
from snows.network.layers import Layer
from snows.network.trace import Values
from snows.network.window import Window
from snows.solve.objective import Objective

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
        max_bytes: int = MAX_BYTES,
    ):
        rows = mask.flatten(1)
        self.scale = scale / scale.mean().clamp_min(torch.finfo(scale.dtype).tiny) + damping
        size = max(1, int(rows.sum(1).max()))  # an empty support has a padded column too
        # Row i's support, padded with columns off the support, which `kept` cancels.
        self.support = rows.int().argsort(dim=1, descending=True, stable=True)[:, :size]
        self.kept = rows.gather(1, self.support).to(moment.dtype)
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
        rows = residual.flatten(1).gather(1, self.support) * self.kept
        parts = [torch.bmm(inverse, rows[:, block, None])[..., 0] for block, inverse in self.blocks]
        solved = torch.cat(parts, dim=1) / self.scale[:, None] * self.kept
        return torch.zeros_like(residual.flatten(1)).scatter_(1, self.support, solved).view_as(residual)


def inverse_of(factor: Tensor) -> Tensor:
    """(L L^T)^-1 of Cholesky factors L, (n, width, width): on a GPU in batches, where torch's own takes one by one."""
    if factor.device.type == "cpu":
        return torch.cholesky_inverse(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return inverse.mT @ inverse


def input_moment(objective: Objective) -> Tensor:
    """A: the sum of x x^T over sampled images and positions, (groups, in, in); x ends in 1 if biases are solved."""
    layer, total = objective.window.layer, 0.0
    module = objective.window.network.module(layer.node)
    for i in objective.sample(SAMPLE):
        total = total + second_moment(module, objective.inputs(i)[layer.node.args[0]], objective.biases)
    return total


def output_scale(objective: Objective, weight: Tensor, seed: int) -> Tensor:
    """g: the diagonal of  sum_k c_k J_k^T J_k  with respect to the layer's output channels, (out,).

    Estimated with one probe of random signs u per image: the mean of (J^T C^1/2 u)^2 is that diagonal (Hutchinson).
    """
    generator, total = generator_for(objective.device, seed), 0.0
    for i in objective.sample(SAMPLE):
        values = objective.inputs(i)
        pulled = pull_back_probe(objective.window, values, weight, objective.coefficients, generator)
        total = total + by_channel(pulled, objective.window.layer).square().sum(0)
    return total


def by_channel(output: Tensor, layer: Layer) -> Tensor:
    """A layer's output as (images and positions, out)."""
    channels_last = output.movedim(1, -1) if len(layer.shape) > 2 else output
    return channels_last.flatten(0, -2)


def pull_back_probe(
    window: Window, values: Values, weight: Tensor, coefficients: list[float], generator: torch.Generator
) -> Tensor:
    """J^T C^1/2 u for random signs u, shaped as the layer's output."""
    with torch.no_grad():
        output = window.output(values, weight)
    output.requires_grad_()
    with torch.enable_grad():
        features = window.behind(values, output)
    return pull_back(features, [output], coefficients, generator)[0]


def pull_back(
    features: list[Tensor], outputs: list[Tensor], coefficients: list[float], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """J^T C^1/2 u for random signs u, by each of the outputs that the features were computed from."""
    signs = [random_signs(f, generator) * c**0.5 for f, c in zip(features, coefficients)]
    features, signs = zip(*((f, sign) for f, sign in zip(features, signs) if f.requires_grad))
    return grad(features, outputs, signs)


def generator_for(device: torch.device | str, seed: int) -> torch.Generator:
    """Random numbers where they are used, on a GPU; from the host for all else."""
    return torch.Generator(device if is_gpu(device) else "cpu").manual_seed(seed)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 with equal probability, shaped as a tensor and where it is; drawn as single bytes."""
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device=generator.device)
    return drawn.to(like.device).to(like.dtype).mul_(2).sub_(1)


def row_inverses(
    objective: Objective, weight: Tensor, mask: Tensor, seed: int, max_bytes: int = MAX_BYTES
) -> RowInverses:
    """The preconditioner of a layer at `weight`, the objective's unknown.

    Costs one unfolding of the layer's inputs and one backward pass, over a sample of the calibration set.
    """
    scale = output_scale(objective, objective.split(weight)[0], seed)
    return RowInverses(input_moment(objective), scale, mask, max_bytes=max_bytes)
