"""Channels in another order: the network computes the same function, and N:M keeps more of it."""

import pytest
import torch
from helpers import TinyCNN, randomise
from resnet_cifar import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import snows
from snows.masks import slots
from snows.masks.permute import permute


class Plain(nn.Module):
    """Convolutions in a row, with all that may lie between them, and a linear head."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.SiLU(), nn.Dropout(), nn.Linear(12, 3))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


BRANCHES = {f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)} | {f"layer{i}.0.downsample.0" for i in (2, 3)}
READERS = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")}
NETWORKS = {
    "plain": (Plain, 2, {"features.4", "head.4"}),
    "residual": (
        lambda: ResNet(8, 10),
        3,
        {f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)}
        | {f"layer{i}.0.downsample.0" for i in (2, 3)}
        | {"fc"},
    ),
    "transformer": (
        lambda: VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3),
        3,
        READERS | {"head"},
    ),
    "nothing to permute": (TinyCNN, 2, set()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_n_m_keeps_more_of_every_layer_that_may_be_permuted(name):
    build, channels, expected = NETWORKS[name]
    model = randomise(build())
    images = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    permuted = permute(model, snows.NM(1, 4))
    torch.testing.assert_close(permuted.model(images), model(images))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert set(permuted.kept) == expected
    plain = snows.prune(model, None, snows.NM(1, 4), algo="MP") if expected else None
    more = snows.prune(permuted.model, None, snows.NM(1, 4), algo="MP") if expected else None
    for layer, (share_before, share_after) in permuted.kept.items():
        weight = model.get_submodule(layer).weight.abs().sum()
        assert share_before == pytest.approx((plain.model.get_submodule(layer).weight.abs().sum() / weight).item())
        assert share_after == pytest.approx((more.model.get_submodule(layer).weight.abs().sum() / weight).item())
    assert not expected or sum(after - before for before, after in permuted.kept.values()) > 0


def test_a_network_that_would_compute_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(slots.METHODS, "cumsum", slots.elementwise)  # a rule that is not so
    model = nn.Sequential(nn.Conv2d(2, 8, 3), Cumulated(), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = randomise(model)
    for example in (images, (2, 8, 8), lambda: images):
        with pytest.raises(snows.SnowsError, match="something else"):
            permute(model, snows.NM(1, 4), example=example)


class Cumulated(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def tie(one, other, parameter="weight"):
    return lambda m: setattr(m.get_submodule(other), parameter, m.get_submodule(one).get_parameter(parameter))


class Rows(nn.Module):
    """Linear maps in rows, with a norm; `read`: a map whose weight the forward pass also reads itself."""

    def __init__(self, change=lambda model: None, read=None):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.third, self.last_norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.read = read
        change(self)

    def forward(self, x):
        x = x.flatten(1)
        y = self.last_norm(self.third(self.second(self.norm(self.first(x)))))
        return y if self.read is None else y + nn.functional.linear(x, self.get_submodule(self.read).weight)


def watch(model):
    model.norm.register_forward_hook(lambda module, inputs, output: output * torch.arange(8))


SHARED = {
    "producer tied": (tie("first", "third"), None, set()),
    "consumer tied": (tie("second", "third"), None, set()),
    "norm tied": (tie("norm", "last_norm"), None, {"third"}),
    "bias tied": (tie("first", "last_norm", "bias"), None, {"third"}),
    "producer read elsewhere": (lambda model: None, "first", {"third"}),
    "consumer read elsewhere": (lambda model: None, "third", {"second"}),
    "watched": (watch, None, {"third"}),
}


@pytest.mark.parametrize("name", SHARED)
def test_channels_that_something_else_reads_stay_in_their_order(name):
    change, read, expected = SHARED[name]
    model = randomise(Rows(change, read))
    images = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    permuted = permute(model, snows.NM(1, 4))
    torch.testing.assert_close(permuted.model(images), model(images))
    assert set(permuted.kept) == expected


@pytest.mark.parametrize("norm", [nn.Identity(), nn.GroupNorm(2, 8), nn.Sequential(nn.Flatten(2), nn.LayerNorm(36))])
@pytest.mark.parametrize("groups", [1, 2])
def test_only_what_treats_every_channel_alike_may_lie_between(norm, groups):
    tail = [nn.Unflatten(2, (6, 6))] if isinstance(norm, nn.Sequential) else []
    layers = [nn.Conv2d(2, 8, 3, groups=groups), norm, *tail, nn.Conv2d(8, 4, 1), nn.Flatten()]
    model, images = randomise(nn.Sequential(*layers)), torch.randn(4, 2, 8, 8, dtype=torch.float64)
    permuted = permute(model, snows.NM(1, 4))
    torch.testing.assert_close(permuted.model(images), model(images))
    assert bool(permuted.kept) == (groups == 1 and isinstance(norm, nn.Identity))


def test_a_norm_over_more_than_the_channels_keeps_them_in_order():
    model = randomise(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm((6, 8)), nn.Linear(8, 4)))
    tokens = torch.randn(3, 6, 4, dtype=torch.float64)
    permuted = permute(model, snows.NM(1, 4))
    torch.testing.assert_close(permuted.model(tokens), model(tokens))
    assert permuted.kept == {}


def test_a_producer_that_is_called_twice_is_left_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.flat = nn.Linear(8, 8), nn.Linear(8, 8), nn.Flatten()

        def forward(self, x):
            return self.second(self.first(self.first(self.flat(x))))

    assert permute(randomise(Twice()), snows.NM(2, 4)).kept == {}


def test_a_layer_of_another_pattern_keeps_its_own():
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    model[3].weight.data = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).repeat(2, 1)
    pattern = snows.NM(1, 4, {"3": "2:4"})
    assert permute(model, pattern).kept == {"3": (0.5, 1.0)}
    assert permute(model, snows.NM(1, 4), layers=lambda name: name != "3").kept == {}
    assert permute(model, snows.NM(1, 4, {"3": "dense"})).kept == {}


def test_layers_of_two_patterns_share_an_order():
    model = randomise(Rows(lambda m: setattr(m, "both", nn.Linear(8, 8)), "both"))
    images = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    permuted = permute(model, snows.NM(1, 4, {"second": "1:2"}))
    torch.testing.assert_close(permuted.model(images), model(images))
    assert set(permuted.kept) == {"second", "third"}


def test_another_pattern_than_n_m_is_refused():
    with pytest.raises(snows.UsageError, match="channels are put in order for an N:M pattern, not for Unstructured"):
        permute(Plain(), snows.Unstructured(0.5))
