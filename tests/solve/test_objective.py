"""Loss, gradient and products against dense float64 references, at every support size."""

import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import randomise
from hypothesis import given
from hypothesis import strategies as st
from references import DenseReference, build
from torch import nn
from torch.func import functional_call

import snows.budget
import snows.solve.curvature
from snows.calibration.stream import Stream
from snows.errors import SnowsError
from snows.network.derivatives import explained
from snows.network.network import Network
from snows.network.tangent import Tangents
from snows.options import Options
from snows.solve.curvature import Curvature
from snows.solve.objective import Objective, reconstruction
from snows.solve.preconditioner import output_metric


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("k_step", [0, 2, 9])
def test_products_equal_the_dense_matrix_at_every_support_size(tiny, images, curvature, index, k_step):
    objective, _, weight = build(tiny, images, index, k_step, curvature)
    expected, here = DenseReference(objective, weight), Curvature(objective, weight)
    torch.testing.assert_close(here.loss, expected.loss)
    torch.testing.assert_close(objective.loss(weight), expected.loss)
    torch.testing.assert_close(here.gradient, expected.gradient)
    matrix = expected.matrix(curvature)
    generator = torch.Generator().manual_seed(0)
    for size in (1, weight.numel() // 2, weight.numel()):  # exact however large the support is: no block is dropped
        vector = torch.zeros(weight.numel(), dtype=torch.float64)
        support = torch.randperm(weight.numel(), generator=generator)[:size]
        vector[support] = torch.randn(size, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(here.matvec(vector.view_as(weight)).flatten(), matrix @ vector)


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_through_attention(layer, curvature):
    """Fused attention has no second derivative: windows must use the kernel that has."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=4, num_heads=2, depth=2, num_classes=3, in_chans=2
    )
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = randomise(model)
    index = [each.name for each in Network(model).layers].index(layer)
    objective, _, weight = build(model, images, index, 6, curvature)
    expected, here = DenseReference(objective, weight), Curvature(objective, weight)
    vector = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(here.gradient, expected.gradient)
    torch.testing.assert_close(here.matvec(vector).flatten(), expected.matrix(curvature) @ vector.flatten())


@pytest.mark.parametrize("index", [0, 1, 2, 3])  # a BatchNorm's bias, the same with a bias before it, two own biases
def test_products_with_biases(tiny, images, index):
    objective, dense, theta = build(tiny, images, index, 5, "hessian", biases=True)
    expected, here = DenseReference(objective, theta), Curvature(objective, theta)
    vector = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(here.loss, expected.loss)
    torch.testing.assert_close(here.gradient, expected.gradient)
    torch.testing.assert_close(here.matvec(vector).flatten(), expected.hessian @ vector.flatten())
    assert objective.loss(dense) < 1e-20
    (weight,), (update,) = objective.variables.unpack(theta)
    assert torch.equal(torch.cat([weight.flatten(1), update[:, None]], dim=1).flatten(), theta)
    assert torch.equal(objective.variables.pack([weight], 2.0).view(len(weight), -1)[:, -1], torch.full_like(update, 2))


def test_gauss_newton_equals_the_hessian_where_the_residual_is_zero(tiny, images):
    products = []
    for curvature in ("ggn", "hessian"):
        objective, weight, _ = build(tiny, images, 0, 6, curvature)
        assert objective.loss(weight) < 1e-20
        products.append(Curvature(objective, weight).matvec(torch.ones_like(weight)))
    torch.testing.assert_close(*products, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_sampled_curvature_is_that_of_the_sample_and_the_gradient_that_of_all_images(tiny, images, curvature):
    whole, _, weight = build(tiny, images, 0, 4, curvature, batch=1)
    sampled, _, _ = build(tiny, images, 0, 4, curvature, batch=1, curvature_images=2)
    chosen = sampled.sample(2)
    assert chosen == [0, 2]  # of five
    here = Curvature(sampled, weight)
    expected = DenseReference(whole, weight)
    torch.testing.assert_close((here.loss, here.gradient), (expected.loss, expected.gradient))
    parts = [whole.on([i]) for i in chosen]
    for part in parts:
        part.coefficients = whole.coefficients
    matrix = sum(DenseReference(part, weight).matrix(curvature) for part in parts)
    vector = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    torch.testing.assert_close(here.matvec(vector).flatten(), 5 / 2 * matrix @ vector.flatten())
    assert here.share == 2 / 5


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 120))
def test_a_sample_is_spread_and_large_enough(sizes, wanted):
    objective = Objective.__new__(Objective)
    sizes = [max(sizes)] * (len(sizes) - 1) + [min(sizes)]
    objective.examples, objective.indices = SimpleNamespace(sizes=sizes), list(range(len(sizes)))
    chosen, held = objective.sample(wanted), objective.images
    assert sorted({0, *chosen}) == chosen
    assert chosen[-1] < len(sizes)
    assert sum(sizes[i] for i in chosen) >= min(wanted or held, held) - 8  # the last is short


def test_products_do_not_depend_on_the_micro_batch_nor_on_what_is_kept(tiny, images, monkeypatch):
    results, plenty = [], 2**40
    # (batch, free memory at the start and behind each micro-batch, which of these are kept)
    whole, parts = (5, [plenty] * 2, [True]), (2, [plenty] * 4, [True] * 3)  # the last, shorter batch counts
    none, some = (3, [-plenty] * 3, [False] * 2), (2, [plenty, plenty, 0, 0], [True, False, False])  # others take it
    for batch, free, kept in (whole, parts, none, some):
        left = iter(free)
        monkeypatch.setattr(snows.budget, "free_memory", lambda device, left=left: next(left))
        objective, _, weight = build(tiny, images, 0, 4, "ggn", batch=batch)
        assert objective.images == 5
        here = Curvature(objective, weight)
        assert [operator is not None for operator in here.operators.values()] == kept
        results.append((here.loss, here.gradient, here.matvec(torch.ones_like(weight))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_depth_weights(tiny, images):
    objective, weight, _ = build(tiny, images, 0, 3, "ggn")
    torch.testing.assert_close(objective.loss(torch.zeros_like(weight)) > 0, torch.tensor(True))
    for k, c in enumerate(objective.coefficients):
        total = torch.cat([objective.targets(i)[k] for i in objective.indices])
        assert c == pytest.approx(1 / total.square().sum().item())
    objective, *_ = build(tiny, images, 0, 3, "ggn", depth_weights="mean")
    for k, c in enumerate(objective.coefficients):
        assert c == pytest.approx(1 / sum(objective.targets(i)[k].numel() for i in objective.indices))


def test_targets_dense_are_the_dense_networks_own_features(tiny, images):
    network = Network(tiny)
    layer = network.layers[2]
    dense_model = randomise(type(tiny)())
    sparse_model = network.model
    weight = sparse_model.get_parameter(layer.parameter).clone()
    sparse_model.stem.weight.data.mul_(0.5)  # an earlier layer has been pruned
    streams = [Stream(network, model, [images], "cpu") for model in (sparse_model, dense_model)]
    for stream in streams:
        stream.advance(layer.node)
    seen = []
    dense_model.gate.register_forward_hook(lambda m, i, o: seen.append(o))
    dense_model(images)
    objective = reconstruction([layer], *streams, Options(k_step=1, biases=False))
    torch.testing.assert_close(objective.targets(0)[0], seen[0])
    assert objective.loss(objective.variables.pack([weight])) > 1e-6
    same = reconstruction([layer], *streams, Options(k_step=1, biases=False, targets="same"))
    assert (
        same.loss(same.variables.pack([dense_model.gate.weight])) < 1e-20
    )  # the dense network on the pruned network's features
    halved = functional_call(tiny, {"stem.weight": sparse_model.stem.weight}, images)
    assert not torch.allclose(halved, tiny(images))


ACTIVATIONS = [
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.PReLU, nn.Softsign, nn.LogSigmoid),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_through_every_activation(activation, images):
    """Torch cannot differentiate the derivative of some activations: windows replace those by equal functions."""
    model = randomise(nn.Sequential(nn.Conv2d(2, 3, 1), activation(), nn.Conv2d(3, 2, 1)))
    objective, _, weight = build(model, images, 0, 2, "ggn")
    expected = model[2](model[1](nn.functional.conv2d(images, weight.view_as(model[0].weight), model[0].bias)))
    got = torch.cat([objective.features(objective.inputs(i), weight)[-1] for i in objective.indices])
    torch.testing.assert_close(got, expected)
    reference, here = DenseReference(objective, weight), Curvature(objective, weight)
    torch.testing.assert_close(here.gradient, reference.gradient)
    vector = torch.ones_like(weight)
    torch.testing.assert_close(here.matvec(vector).flatten(), reference.gauss_newton @ vector.flatten())


class HardSigmoid(nn.Module):
    def forward(self, x):
        return torch.ops.aten.hardsigmoid(x)


class Step(nn.Module):
    def forward(self, x):
        return torch.heaviside(x, x)


@pytest.mark.parametrize(
    ("curvature", "operation", "name"), [("hessian", HardSigmoid, "hardsigmoid"), ("ggn", Step, "heaviside")]
)
def test_an_operation_without_the_derivative_it_needs_is_named(images, curvature, operation, name):
    model = randomise(nn.Sequential(nn.Conv2d(2, 2, 1), operation(), nn.Conv2d(2, 2, 1)))
    objective, _, weight = build(model, images, 0, 1, curvature)
    message = rf"cannot solve layer 0: torch cannot differentiate {name},"
    with pytest.raises(SnowsError, match=message), explained(objective.window):
        Curvature(objective, weight).matvec(weight)


def test_a_linearisation_lets_go_of_everything(tiny, images, monkeypatch):
    """Graphs that autograd or the tangents' rules keep alive through a cycle would add up over the steps of a job."""
    objective, _, weight = build(tiny, images, 0, 6, "ggn")
    alive = []

    class Watched(Tangents):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(snows.solve.curvature, "Tangents", Watched)
    for module in (objective.window.model.relu, objective.window.model.fc):
        module.register_forward_hook(lambda m, i, output: alive.append(weakref.ref(output)))
    here = Curvature(objective, weight)
    here.matvec(weight)
    assert any(reference() is not None for reference in alive)
    del here
    assert all(reference() is None for reference in alive)


class ReadsAShape(nn.Module):
    """Behind the first layer, a position embedding that takes no more of its output than the shape."""

    def __init__(self):
        super().__init__()
        self.first, self.position, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.position(torch.ones_like(x)))


def test_a_feature_that_takes_only_the_shape_has_no_derivative_and_does_no_harm():
    model, images = randomise(ReadsAShape()), torch.randn(5, 3, dtype=torch.float64)
    for curvature in ("ggn", "hessian"):
        objective, _, weight = build(model, images, 0, 5, curvature)
        assert len(objective.targets(0)) == 3
        expected, here = DenseReference(objective, weight), Curvature(objective, weight)
        vector = torch.ones_like(weight)
        torch.testing.assert_close(here.gradient, expected.gradient)
        torch.testing.assert_close(here.matvec(vector).flatten(), expected.matrix(curvature) @ vector.flatten())
        assert (output_metric(objective, *objective.variables.unpack(weight)[0], seed=0) > 0).all()
