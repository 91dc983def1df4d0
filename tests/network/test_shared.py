"""Parameters that several modules share, and modules that several places call: what is written is what was solved."""

import pytest
import torch
from helpers import randomise
from torch import nn

import snows
from snows.calibration.streams import Streams
from snows.network.network import Network
from snows.solve.objective import reconstruction


class Pair(nn.Module):
    """Two convolutions in a row, each with a BatchNorm, and a head; `share` ties some of it."""

    def __init__(self, share=lambda pair: None):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.head = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        share(self)

    def forward(self, x):
        for conv, norm in zip((self.first, self.second, self.third), self.norms):
            x = torch.relu(norm(conv(x)))
        return self.out(torch.relu(self.head(x.mean((2, 3)))))


def one_norm(pair):
    pair.norms = nn.ModuleList([pair.norms[0]] * 3)


def one_norm_bias(pair):
    pair.norms[1].bias = pair.norms[0].bias


def one_bias(pair):
    pair.out.bias = pair.head.bias


@pytest.mark.parametrize("share", [lambda pair: None, one_norm, one_norm_bias, one_bias])
def test_the_loss_of_the_returned_model_is_the_one_that_was_reported(images, share):
    model = randomise(Pair(share))
    for name in ("first", "second", "head"):
        options = snows.Options(k_step=10, batch_size=5, schedule=0, joint_steps=0, min_samples=0)
        pruned = snows.prune(model, images, snows.NM(1, 2), options, layers=lambda layer, name=name: layer == name)
        network = Network(model)
        layer = next(layer for layer in network.layers if layer.name == name)
        streams = Streams(Network(pruned.model), [images], "cpu")
        streams.dense_model = network.model
        streams.restart()
        streams.advance(next(each for each in streams.network.layers if each.name == name))
        here = next(each for each in streams.network.layers if each.name == name)
        objective = reconstruction([here], streams.sparse, streams.dense, options.but(biases=False))
        loss = objective.loss(objective.variables.pack([pruned.model.get_parameter(layer.parameter)])).item()
        assert loss == pytest.approx(pruned.layers[0].loss_after)
        assert pruned.layers[0].loss_after < pruned.layers[0].loss_before


def test_a_weight_of_two_layers_is_left_dense_and_counted_once(images):
    def tie(pair):
        pair.third.weight = pair.second.weight

    model = randomise(Pair(tie))
    pruned = snows.prune(model, images, snows.Unstructured(0.3), snows.Options(batch_size=5))
    assert set(pruned.masks) == {"first", "head", "out"}
    assert pruned.left_dense == dict.fromkeys(("second", "third"), "its weight is that of another layer too")
    assert pruned.sparsity == pytest.approx(0.3, abs=1 / sum(p.numel() for p in model.parameters()))
    for name, mask in pruned.masks.items():
        assert (pruned.model.get_submodule(name).weight[~mask] == 0).all()


class Standardised(nn.Conv2d):
    """A convolution with a standardised kernel: zeros in its weight are none in the kernel."""

    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


class Signs(nn.Conv2d):
    """A binary convolution, whose parent's forward pass calls what it replaces."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.sign(), bias)


class Watched(nn.Conv2d):
    """A convolution with a hook behind it, which leaves zeros in its weight zeros."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_forward_hook(lambda module, args, out: out.relu())


class Gained(Standardised):
    """The same behind a gain of zero, as residual branches begin."""

    def forward(self, x):
        return 0 * super().forward(x)


class Absolute(nn.Conv2d):
    """A convolution that does something of its own with its input, which leaves zeros zeros."""

    def forward(self, x):
        return super().forward(x.abs())


class Opaque(nn.Module):
    """A block that the trace does not look into."""

    def __init__(self, kind):
        super().__init__()
        self.conv = kind(2, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "pruned"),
    [(nn.Conv2d, True), (Absolute, True), (Standardised, False), (Gained, False), (Signs, False), (Watched, True)],
)
@pytest.mark.parametrize("opaque", [True, False])
def test_a_convolution_that_multiplies_by_another_weight_than_its_own_is_left_dense(monkeypatch, kind, pruned, opaque):
    if opaque:
        monkeypatch.setattr("snows.network.trace.get_notrace_modules", lambda: [Opaque])
    network = Network(randomise(nn.Sequential(Opaque(kind), nn.Flatten(), nn.Linear(64, 2))))
    assert [layer.name for layer in network.layers] == ["0.conv"] * pruned + ["2"]
    assert pruned or "does not multiply by its weight" in network.refused["0.conv"] or not opaque
    assert set(network.refused) == (set() if pruned else {"0.conv"})
