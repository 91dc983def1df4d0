"""Layers are what a network computes, not how it is written: modules and functions are solved alike."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import randomise
from torch import nn

import snows
from snows.calibration.stream import Stream
from snows.network.inputs import layer_columns
from snows.network.network import Network
from snows.network.window import Window


class Modules(nn.Module):
    """conv - norm - act, grouped conv without bias - norm - act, conv, head: as modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.norm2 = nn.Conv2d(4, 8, 3, padding="same", groups=2, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.plain, self.head = nn.Conv2d(8, 4, (1, 2), dilation=(1, 2), padding=(0, 2)), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.sigmoid(self.norm2(self.grouped(x)))
        return self.head(torch.tanh(self.plain(x)).mean((2, 3)))


def normalised(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class Functions(Modules):
    """The same by functions on the same parameters."""

    def forward(self, x):
        x = torch.relu(normalised(F.conv2d(x, self.conv.weight, self.conv.bias, 2, padding=1), self.norm))
        x = torch.sigmoid(normalised(F.conv2d(x, self.grouped.weight, padding="same", groups=2), self.norm2))
        x = torch.conv2d(x, self.plain.weight, self.plain.bias, dilation=(1, 2), padding=(0, 2))
        return F.linear(torch.tanh(x).mean((2, 3)), self.head.weight, self.head.bias)


class OwnConv(nn.Conv2d):
    """A convolution with "same" padding of its own, from its weight's size."""

    def forward(self, x):
        kh, kw = self.weight.shape[-2:]
        x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Subclasses(Modules):
    """The same by classes of one's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = OwnConv(2, 4, 3, stride=2), OwnNorm(4)
        self.grouped, self.norm2 = OwnConv(4, 8, 3, groups=2, bias=False), OwnNorm(8, eps=1e-3)


CODINGS = [Functions, Subclasses]
NAMES = ["conv", "grouped", "plain", "head"]


def at_layer(network, layer, images):
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(layer.node)
    window = Window(network, [layer], 3)
    return window, window.enter(stream[0])


@pytest.mark.parametrize("coding", CODINGS)
def test_the_same_function_has_the_same_windows_in_every_coding(coding, images):
    """Features one by one, as many of them, with a bias update too, which says what is folded."""
    networks = [Network(randomise(kind())) for kind in (Modules, coding)]
    assert [layer.name for layer in networks[1].layers] == NAMES
    for layers in zip(*(network.layers for network in networks), strict=True):
        assert (layers[0].bias, layers[0].groups, layers[0].shape) == (
            layers[1].bias,
            layers[1].groups,
            layers[1].shape,
        )
        features = []
        for network, layer in zip(networks, layers):
            window, values = at_layer(network, layer, images)
            weight = network.model.get_parameter(layer.parameter)
            update = torch.linspace(-1, 1, len(weight), dtype=weight.dtype)
            features.append(window(values, [1.3 * weight], [update]))
        assert len(features[0]) == len(features[1])
        for ours, reference in zip(features[1], features[0]):
            torch.testing.assert_close(ours, reference)
    assert networks[1].layers[1].bias == "norm2.bias"


@pytest.mark.parametrize("coding", CODINGS)
def test_input_columns_are_the_same_in_every_coding(coding, images):
    columns = []
    for network in (Network(randomise(kind())) for kind in (Modules, coding)):
        stream = Stream(network, network.model, [images], "cpu")
        columns.append([])
        for layer in network.layers:
            stream.advance(layer.node)
            columns[-1].append(layer_columns(network, layer, stream[0][layer.node.args[0]]))
    for ours, reference in zip(columns[1], columns[0], strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(
    ("mask_alg", "algo", "curvature"),
    [("MP", "SNOWS", "ggn"), ("OBS", "SNOWS", "hessian"), ("Wanda", "MP+", "ggn"), ("SparseGPT", "SparseGPT", "ggn")],
)
def test_the_same_function_gets_the_same_masks_and_solution_in_every_coding(mask_alg, algo, curvature, coding, images):
    options = snows.Options(batch_size=2, schedule=1, joint_steps=1, curvature=curvature)
    how = {"mask_alg": mask_alg, "algo": algo}
    reference, ours = (
        snows.prune(randomise(kind()), images, snows.NM(1, 2), options, **how) for kind in (Modules, coding)
    )
    assert list(ours.masks) == list(reference.masks) == NAMES
    assert all(torch.equal(mask, reference.masks[name]) for name, mask in ours.masks.items())
    for name, weight in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=1e-6, atol=1e-6)


class Raw(nn.Module):
    """Linear maps on parameters that no Conv2d or Linear owns."""

    def __init__(self):
        super().__init__()
        self.kernel, self.norm = nn.Parameter(torch.zeros(4, 2, 1, 1)), nn.BatchNorm2d(4)
        self.head_weight, self.offset = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(4))  # of nothing

    def forward(self, x):
        x = torch.relu(self.norm(F.conv2d(x, self.kernel)))
        return F.linear(x.mean((2, 3)), self.head_weight, self.offset)


def test_parameters_of_any_module_are_layers_where_a_function_multiplies_by_them(images):
    network = Network(randomise(Raw()))
    assert [(layer.name, layer.bias) for layer in network.layers] == [("kernel", "norm.bias"), ("head", "offset")]
    assert len(network.batch_norm_of) == 1
    pruned = snows.prune(randomise(Raw()), images, snows.NM(1, 2), snows.Options(batch_size=5))
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)
    assert (pruned.model.kernel[~pruned.masks["kernel"]] == 0).all()
    assert pruned.model.state_dict().keys() == Raw().state_dict().keys()


def test_a_function_with_a_computed_bias_or_settings_is_no_more_than_it_shows(images):
    """Its bias is not solved, nor is a BatchNorm folded; where the padding is computed, its columns are not had."""

    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.second, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(F.conv2d(x, self.first.weight, 2 * self.first.bias, padding=1))
            y = self.norm2(F.conv2d(y, self.second.weight, self.second.bias, padding=x.shape[2] // 4))
            return y.mean((2, 3))

    network = Network(randomise(Computed()))
    assert [layer.bias for layer in network.layers] == [None, "second.bias"]
    assert not network.batch_norm_of
    options = snows.Options(batch_size=5, min_samples=0)
    pruned = snows.prune(randomise(Computed()), images, snows.NM(1, 2), options)
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)
    with pytest.raises(snows.UsageError, match="those of second cannot be unfolded"):
        snows.prune(randomise(Computed()), images, snows.NM(1, 2), mask_alg="Wanda", algo="MP")


def test_timms_same_padding_is_a_padding_and_a_convolution():
    """Every BatchNorm of an EfficientNet is folded, and every convolution shows its inputs."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7)
    network = Network(model)
    convolutions = [layer for layer in network.layers if len(layer.shape) == 4]
    assert {layer.name for layer in convolutions if isinstance(model.get_submodule(layer.name), timm.layers.Conv2dSame)}
    assert {layer.node for layer in convolutions} == set(network.batch_norm_of)
    assert all(layer.bias == f"{network.batch_norm_of[layer.node].target}.bias" for layer in convolutions)
    stream = Stream(network, network.model, [torch.randn(1, 3, 32, 32)], "cpu")
    stream.advance(network.layers[0].node)
    x = stream[0][network.layers[0].node.args[0]]
    assert layer_columns(network, network.layers[0], x).shape == (1, 27, 16 * 16)


@pytest.mark.parametrize("kind", [timm.layers.StdConv2d, timm.layers.StdConv2dSame, timm.layers.ScaledStdConv2d])
def test_standardised_convolutions_are_still_refused(kind):
    network = Network(randomise(nn.Sequential(kind(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))))
    assert [layer.name for layer in network.layers] == ["3"]
    assert set(network.refused) == {"0"}
