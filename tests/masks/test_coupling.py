"""Which channels share an order: any order of them leaves the function as it is, and what is not understood stays."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import randomise
from timm.layers import Conv2dSame
from torch import nn

from snows.masks.coupling import Coupling
from snows.masks.permute import reorder
from snows.network.network import Network


def shuffle(model):
    """Put every set of channels in a random order; returns the layers whose inputs are in another."""
    network = Network(model)
    coupling = Coupling(network)
    generator = torch.Generator().manual_seed(1)
    moved = set()
    for slots in coupling.slots.free():
        name, dim = slots[0]
        size = coupling.tensors[name].shape[dim]
        assert {coupling.tensors[name].shape[dim] for name, dim in slots} == {size}
        reorder(model, slots, torch.randperm(size, generator=generator))
        moved |= {layer.name for layer in network.layers if (layer.parameter, 1) in slots}
    return moved


class Net(nn.Module):
    """A convolution of the images, what is to be followed, and a linear head: `between` is given the model and x."""

    def __init__(self, between, **modules):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.between = between
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.head(self.between(self, self.stem(x))).mean((2, 3))


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


def gated(m, x):
    return x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))


def normed(m, x):
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)


def last(function):
    """Of channels that come last."""
    return lambda m, x: function(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def transposed(m, x):
    tokens = x.flatten(2).transpose(1, 2)
    return (tokens + m.position).transpose(1, 2).unsqueeze(3)


FOLLOWED = {
    "a depthwise convolution": (lambda m, x: m.dw(x), {"dw": nn.Conv2d(8, 8, 3, groups=8)}, {"head"}),
    "one with same padding": (lambda m, x: m.dw(x), {"dw": Conv2dSame(8, 8, 3, stride=2, groups=8)}, {"head"}),
    "a function's depthwise": (
        lambda m, x: F.conv2d(x, m.dw.weight, m.dw.bias, 1, 0, 1, 8),
        {"dw": nn.Conv2d(8, 8, 3, groups=8)},
        {"head"},
    ),
    "a function": (lambda m, x: F.conv2d(x, m.conv.weight), {"conv": nn.Conv2d(8, 8, 1)}, {"head", "conv"}),
    "a BatchNorm": (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(8)}, {"head"}),
    "a function's BatchNorm": (normed, {"norm": nn.BatchNorm2d(8)}, {"head"}),
    "slopes": (lambda m, x: m.slopes(x), {"slopes": nn.PReLU(8)}, {"head"}),
    "one slope": (lambda m, x: m.slope(x), {"slope": nn.PReLU()}, {"head"}),
    "a LayerNorm": (last(lambda m, x: m.norm(x)), {"norm": nn.LayerNorm(8)}, {"head"}),
    "a function's LayerNorm": (
        last(lambda m, x: F.layer_norm(x, (8,), m.norm.weight, m.norm.bias)),
        {"norm": nn.LayerNorm(8)},
        {"head"},
    ),
    "a residual sum": (lambda m, x: x + m.conv(F.gelu(x)), {"conv": nn.Conv2d(8, 8, 3, padding=1)}, {"head", "conv"}),
    "a gate": (gated, {"down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)}, {"head", "down", "up"}),
    "a gate of one channel": (lambda m, x: x * m.gate(x), {"gate": nn.Conv2d(8, 1, 1)}, {"head", "gate"}),
    "reductions by NumPy's names": (
        lambda m, x: x * m.up(F.relu(m.down(x.mean(axis=(2, 3), keepdims=True)))) + x.amax(axis=1, keepdim=True),
        {"down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)},
        {"head", "down", "up"},
    ),
    "sums by NumPy's names": (lambda m, x: x * torch.sum(x, axis=(2, 3), keepdims=True), {}, {"head"}),
    "a concatenation by NumPy's name": (
        lambda m, x: m.conv(torch.cat([x, x], axis=1)),
        {"conv": nn.Conv2d(16, 8, 1)},
        {"head"},
    ),
    "a mean over channels": (lambda m, x: x * x.mean(1, keepdim=True), {}, {"head"}),
    "a scale": (lambda m, x: x * m.scale, {"scale": parameter(8, 1, 1)}, {"head"}),
    "a vector laid out": (lambda m, x: x * m.scale.reshape(1, -1, 1, 1), {"scale": parameter(8)}, {"head"}),
    "a vector given dimensions": (
        lambda m, x: x * m.scale.unsqueeze(-1).unsqueeze(-1),
        {"scale": parameter(8)},
        {"head"},
    ),
    "positions": (transposed, {"position": parameter(1, 64, 8)}, {"head"}),
    "pooling": (lambda m, x: F.max_pool2d(m.pool(x), 2), {"pool": nn.AvgPool2d(2)}, {"head"}),
    "cropping": (lambda m, x: F.pad(x[:, :, ::2, 1:], (1, 0, 0, 0)), {}, {"head"}),
    "a concatenation of positions": (lambda m, x: torch.cat([x, F.relu(x)], 2), {}, {"head"}),
    "flattening after a global pool": (
        lambda m, x: m.fc(torch.flatten(m.pool(x), 1))[:, :, None, None],
        {"pool": nn.AdaptiveAvgPool2d(1), "fc": nn.Linear(8, 8)},
        {"fc"},
    ),
    "a view after a global pool": (
        lambda m, x: (lambda y: m.fc(y.view(y.size(0), -1)))(F.adaptive_avg_pool2d(x, 1)).unsqueeze(2).unsqueeze(3),
        {"fc": nn.Linear(8, 8)},
        {"fc", "head"},
    ),
    "called twice": (lambda m, x: m.conv(m.conv(x)), {"conv": nn.Conv2d(8, 8, 1)}, {"head", "conv"}),
    "a concatenation": (lambda m, x: torch.cat([x[:, :4], x[:, :4]], 1), {}, set()),
    "a concatenation, then a layer": (
        lambda m, x: m.conv(torch.cat([x, F.relu(x)], 1)),
        {"conv": nn.Conv2d(16, 8, 1)},
        {"head"},
    ),
    "parts": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), {}, set()),
    "one channel": (lambda m, x: x * x[:, :1], {}, set()),
    "channels in groups": (lambda m, x: m.conv(x), {"conv": nn.Conv2d(8, 8, 1, groups=2)}, set()),
    "filters of one channel each, two apiece": (
        lambda m, x: m.more(m.two(x)),
        {"two": nn.Conv2d(8, 16, 1, groups=8), "more": nn.Conv2d(16, 8, 1)},
        {"head"},
    ),
    "a GroupNorm": (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 8)}, set()),
    "a shuffle": (lambda m, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), {}, set()),
    "a reshape": (lambda m, x: x.reshape(-1, 2, 4, 8, 8).sum(2).repeat(1, 4, 1, 1), {}, set()),
    "channels as positions": (lambda m, x: x.permute(0, 2, 1, 3), {}, set()),
    "padded channels": (lambda m, x: F.pad(x[:, 2:], (0, 0, 0, 0, 1, 1)), {}, set()),
    "a constant": (lambda m, x: x * torch.arange(8).view(1, 8, 1, 1), {}, set()),
    "a scale that is read elsewhere": (
        lambda m, x: x * m.scale + m.scale.cumsum(0),
        {"scale": parameter(8, 1, 1)},
        set(),
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_any_order_of_what_is_followed_leaves_the_function_as_it_is(name):
    between, modules, expected = FOLLOWED[name]
    model = randomise(Net(between, **modules))
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = model(images)
    assert shuffle(model) == expected
    torch.testing.assert_close(model(images), before)


REAL = {"test_resnet": 15, "test_efficientnet": 15, "test_convnext2": 12, "test_vit3": 30, "mobilenetv2_035": 35}


@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_followed(name):
    model = timm.create_model(name).double().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:  # norms, biases and layer scales away from their defaults
            tensor.add_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    images = torch.randn(2, *model.default_cfg["input_size"], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        assert len(shuffle(model)) == REAL[name]
        torch.testing.assert_close(model(images), before)


def test_two_buffers_in_one_memory_stay():
    def scaled(m, x):
        return F.batch_norm(F.batch_norm(x, m.norm.running_mean, m.norm.running_var), m.twin, m.norm.running_var)

    model = Net(scaled, norm=nn.BatchNorm2d(8))
    model.register_buffer("twin", model.norm.running_mean.view(8))
    assert shuffle(model) == set()
    del model.twin
    model.register_buffer("twin", torch.ones(8))
    assert shuffle(model) == {"head"}
