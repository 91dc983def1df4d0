"""The tangent pass against torch's own derivative of the window's features, for every kind of operation."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import OnceDifferentiable, randomise
from torch import nn
from torch.autograd.functional import jvp

import snows
from snows.calibration.stream import Stream
from snows.network.network import Network
from snows.network.tangent import Tangents, by_double_backward
from snows.options import Options
from snows.solve.objective import reconstruction


class Sums(nn.Module):
    """Sums that broadcast, that scale, of a value with itself, and with a number."""

    def __init__(self):
        super().__init__()
        self.conv, self.offset = nn.Conv2d(2, 4, 1), nn.Parameter(torch.zeros(3, 1, 4, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        stacked = torch.relu(x + self.offset)  # (3, n, 4, h, w)
        return torch.sigmoid(torch.add(stacked.sum(0), x, alpha=0.3) + x + 2.0 + x + (x + x))


class Twice(nn.Module):
    """One convolution that is called twice, so that its second call moves with its input and with its weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))


class Attending(nn.Module):
    """Attention over positions; `moving`: which of queries, keys and values lie behind the layer."""

    def __init__(self, moving, **kwargs):
        super().__init__()
        self.conv, self.moving, self.kwargs = nn.Conv2d(2, 4, 1), moving, kwargs

    def forward(self, x):
        fixed = torch.cat([x, 1 - x], 1).flatten(2).transpose(1, 2)
        y = self.conv(x).flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(
            *(y * (i + 1) if i in self.moving else fixed for i in range(3)), **self.kwargs
        )


class Computed(nn.Module):
    """Attention and a size whose numbers the forward pass computes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = F.interpolate(x, size=(x.shape[2] + 2, x.shape[3]), mode="bilinear")
        y = x.view(x.size(0), x.size(1), -1).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, scale=y.shape[-1] ** -0.3)


class ByKeyword(nn.Module):
    """Modules and functions that get their inputs by keyword, in place where they can."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(input=self.bn(input=self.conv(input=x)), inplace=True)
        x = F.hardsigmoid(input=F.conv2d(input=x, weight=self.conv.weight.transpose(0, 1), stride=2))
        x = torch.cat([x, x.tanh()], 1).flatten(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(query=x, key=x, value=x)
        return F.linear(input=x, weight=self.head.weight, bias=self.head.bias)


class Functions(nn.Module):
    """A convolution and BatchNorms as functions on parameters: one that is folded, and one that stands alone."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 2, 1, groups=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (4, 2, 2))

    def forward(self, x):
        numbers = [(norm.running_mean, norm.running_var, norm.weight, norm.bias) for norm in self.norms]
        x = torch.relu(F.batch_norm(F.conv2d(x, self.first.weight, stride=1, padding=1), *numbers[0]))
        x = torch.relu(F.batch_norm(F.conv2d(x, self.conv.weight, self.conv.bias, groups=2), *numbers[1], eps=0.1))
        return torch.tanh(F.batch_norm(x + 1, *numbers[2]))


class MovingParameters(nn.Module):
    """Functions whose weights, biases and slopes depend on the layer, together with their inputs or without them."""

    def __init__(self, apply):
        super().__init__()
        self.conv, self.apply_to, self.fixed = nn.Conv2d(2, 4, 1), apply, nn.Linear(4, 4)

    def forward(self, x):
        fixed = torch.cat([x, 1 - x], 1).flatten(2).transpose(1, 2)  # (n, 16, 4), as y
        y = self.conv(x).flatten(2).transpose(1, 2)
        return torch.tanh(self.apply_to(fixed, y, self.fixed))


@torch.fx.wrap
def mish(x):
    """No function of torch's, for all its name."""
    return x * x.mean()


class Gated(torch.autograd.Function):
    """x sigmoid(y), without a forward mode, as memory-saving activations are written."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y.sigmoid(), gradient * x * y.sigmoid() * (1 - y.sigmoid())


@torch.fx.wrap
def partly_hidden(x):
    return x + OnceDifferentiable.apply(x)


@pytest.mark.parametrize(
    "function", [OnceDifferentiable.apply, partly_hidden, lambda x: OnceDifferentiable.apply(x).sum() * x]
)
def test_a_backward_pass_that_hides_its_derivative_is_no_way_to_a_tangent(function):
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"hides some of its derivative|not have been used|@once_differentiable"):
        by_double_backward(lambda given: function(given["x"]), {"x": x}, {"x": v})


@torch.fx.wrap
def gated(x, y):
    return Gated.apply(x, y)


@torch.fx.wrap
def gated_pair(pair):
    return Gated.apply(*pair), pair[1]


def first_two(pair):
    return pair[0] + pair[1]


MOVING = {
    "function without forward mode": lambda fixed, y, linear: gated(y, y.mean(1, keepdim=True) + 0 * y),
    "function without forward mode, one input": lambda fixed, y, linear: gated(fixed, y) + gated(y, fixed),
    "functions of pairs without forward mode": lambda fixed, y, linear: first_two(gated_pair((fixed, y))),
    "bias": lambda fixed, y, linear: F.linear(fixed, linear.weight, y.mean((0, 1))),
    "bias of one number": lambda fixed, y, linear: F.linear(
        fixed, linear.weight, y.mean((0, 1, 2), keepdim=True)[0, 0]
    ),
    "input and bias": lambda fixed, y, linear: F.linear(y, linear.weight, y.mean((0, 1))),
    "weight": lambda fixed, y, linear: F.linear(fixed, y[0, :4], linear.bias),
    "weight and bias": lambda fixed, y, linear: F.linear(fixed, y[0, :4], y.mean((0, 1))),
    "all three": lambda fixed, y, linear: F.linear(input=y, weight=y[0, :4], bias=y.mean((0, 1))),
    "convolution": lambda fixed, y, linear: F.conv1d(y, y[:4, :16].repeat(2, 1, 1)[:4, :, :1], y.mean((0, 1))),
    "prelu": lambda fixed, y, linear: F.prelu(y.transpose(1, 2), y.mean((0, 1))),
    "prelu of what is fixed": lambda fixed, y, linear: F.prelu(fixed.transpose(1, 2), y.mean((0, 1))),
    "sum with a share": lambda fixed, y, linear: torch.add(fixed, y, alpha=3) + torch.sub(y, fixed, alpha=0.5),
    "sum with a size": lambda fixed, y, linear: torch.add(y, y.shape[0]) + torch.rsub(y, y, alpha=2),
    "a name of torch's": lambda fixed, y, linear: mish(y),
    "softmax by keyword": lambda fixed, y, linear: F.softmax(y, dim=1) + y.softmax(dim=-1),
    "layer norm": lambda fixed, y, linear: F.layer_norm(fixed, (4,), y.mean((0, 1)), y.sum((0, 1))),
}


def sequential(*behind):
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *(module() for module in behind))


OPERATIONS = {
    "reflecting convolution": sequential(lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect", groups=2)),
    "convolution that pads as it needs": lambda: nn.Sequential(timm.layers.Conv2dSame(2, 4, 3, stride=2), nn.ReLU()),
    "folded BatchNorm": sequential(lambda: nn.BatchNorm2d(4), nn.GELU, lambda: nn.Conv2d(4, 2, 3)),
    "folded BatchNorm with activation": sequential(lambda: timm.layers.BatchNormAct2d(4), lambda: nn.Conv2d(4, 2, 3)),
    "BatchNorm that stands alone": sequential(nn.ReLU, lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 2, 1)),
    "BatchNorm alone with activation": sequential(
        lambda: nn.MaxPool2d(2), lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU), lambda: nn.Conv2d(4, 2, 1)
    ),
    "activations": sequential(nn.Hardswish, nn.PReLU, nn.LeakyReLU, nn.Hardsigmoid, lambda: nn.Softmax(1)),
    "gated": sequential(lambda: nn.GLU(1), lambda: nn.Conv2d(2, 2, 1), lambda: nn.Softplus()),
    "norms": sequential(lambda: nn.GroupNorm(2, 4), lambda: nn.LayerNorm(4), nn.Dropout, nn.Identity, nn.Tanh),
    "functions on parameters": Functions,
    "sums": Sums,
    "twice": Twice,
    "computed numbers": Computed,
    "inputs by keyword": ByKeyword,
    "attention": lambda: Attending({0, 1, 2}),
    "attention with a scale": lambda: Attending({0, 1, 2}, scale=0.3),
    "attention, values alone": lambda: Attending({2}),
    "attention, queries alone": lambda: Attending({0}, dropout_p=0.0),
    "attention, keys alone": lambda: Attending({1}),
    "causal attention": lambda: Attending({0, 1, 2}, is_causal=True),
}
OPERATIONS |= {f"moving {name}": lambda apply=apply: MovingParameters(apply) for name, apply in MOVING.items()}


class Recurrent(nn.Module):
    """Whose layers have kernels of oneDNN's in single precision, without derivatives."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Linear(6, 3)
        self.lstm, self.gru = nn.LSTM(4, 3, bidirectional=True, batch_first=True), nn.GRU(6, 6, batch_first=True)

    def forward(self, x):
        x, _ = self.lstm(self.conv(x).flatten(2).transpose(1, 2))
        return self.head(self.gru(x)[0].mean(1))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_recurrent_layers_behind_a_layer_have_derivatives_in_single_precision(curvature):
    model = randomise(Recurrent()).float()
    images = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    options = Options(curvature=curvature, joint_steps=1, schedule=0)
    pruned = snows.prune(model, images, snows.NM(1, 2), options, layers=lambda name: name == "conv")
    assert not pruned.problems
    assert pruned.layers[0].loss_after < pruned.layers[0].loss_before
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_tangents_are_the_derivative_of_the_features(name, biases):
    generator = torch.Generator().manual_seed(1)
    network = Network(randomise(OPERATIONS[name]()))
    images = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    stream = Stream(network, network.model, [images], "cpu")
    layer = network.layers[0]
    stream.advance(layer.node)
    objective = reconstruction([layer], stream, stream, Options(k_step=9, targets="same", biases=biases))
    theta = objective.variables.pack([network.model.get_parameter(layer.parameter)])
    vector = torch.randn(theta.shape, generator=generator, dtype=torch.float64)

    values, window = objective.inputs(0), objective.window
    parameters = window.parameters(*objective.variables.unpack(theta))
    tangents = Tangents(window, window.run(window.nodes, values, parameters), parameters)

    _, expected = jvp(lambda w: tuple(objective.features(values, w)), theta, vector)
    assert len(expected) > 1
    for ours, reference in zip(tangents(*objective.variables.unpack(vector)), expected, strict=True):
        torch.testing.assert_close(ours, reference)
