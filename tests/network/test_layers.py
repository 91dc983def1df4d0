"""Traces, windows and streams: they compute what the model computes, and count what the paper counts."""

import copy
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import TinyCNN, randomise
from torch import nn

import snows
from snows.calibration.stream import Stream
from snows.errors import TraceError
from snows.network.network import Network
from snows.network.trace import run_node
from snows.network.window import Window

FAMILIES = {
    "resnet": lambda: timm.create_model("resnet18", num_classes=7),
    "mobilenet (depthwise, squeeze-excite)": lambda: timm.create_model("mobilenetv3_small_050", num_classes=7),
    "mobilenet of torchvision": lambda: torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35),
    "densenet (concatenation)": lambda: torchvision.models.DenseNet(8, (2, 3), 16, num_classes=7),
    "densenet of timm": lambda: timm.create_model("densenet121", num_classes=7, growth_rate=4, block_config=(2, 2)),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 2, 1)),
    "efficientnet (same padding)": lambda: timm.create_model("tf_efficientnet_b0", num_classes=7),
    "regnet (groups)": lambda: timm.create_model("regnety_002", num_classes=7),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_compose_to_the_models_own_output(family):
    model = randomise(FAMILIES[family]()).float()
    for parameter in model.parameters():  # tame, so that the comparison is one of significant digits
        parameter.data.mul_(0.3)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = Network(model)
    stream = Stream(network, network.model, list(images.split(2)), "cpu")
    expected = model(images).detach()
    picked = network.layers[:: max(1, len(network.layers) // 5)]
    for layer in picked:
        stream.advance(layer.node)
        window = Window(network, [layer], k_step=10**6)
        weight = network.model.get_parameter(layer.parameter)
        got = torch.cat([window(window.enter(stream[i]), [weight])[-1] for i in range(len(stream))])
        assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_every_window_value_equals_the_models_feature(tiny, images):
    """Hooks on the original model are the reference for f_0 .. f_K, BatchNorm folded and ReLU in place or not."""
    network = Network(tiny)
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(network.layers[0].node)
    window = Window(network, [network.layers[0]], k_step=10)
    features = window(window.enter(stream[0]), [tiny.stem.weight])

    seen = []
    reference = copy.deepcopy(tiny)
    reference.relu.inplace = False
    for module in (reference.bn, reference.relu, reference.bn2, reference.gate, reference.fc):
        module.register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))
    reference(images)
    seen.insert(5, torch.sigmoid(seen[4]))  # the functional activation
    assert len(features) == len(seen) == 7  # conv, relu, conv, relu again, conv, sigmoid, linear
    for ours, own in zip(features, seen):
        torch.testing.assert_close(ours, own)


def test_a_shared_relu_counts_each_time_it_is_called(tiny):
    network = Network(tiny)
    counted = [node.name for node in network.nodes if network.is_counted(node)]
    assert counted == ["stem", "relu", "grouped", "relu_1", "gate", "sigmoid", "fc"]


def test_layers_come_in_execution_order_not_in_order_of_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.last(self.first(x))

    network = Network(Backwards())
    assert [layer.name for layer in network.layers] == ["first", "last"]
    assert len(Window(network, [network.layers[0]], 5).features) == 2


def test_a_window_runs_nothing_before_its_layer_and_a_stream_runs_each_module_once(tiny, images):
    calls = []
    network = Network(tiny)
    for name, module in network.model.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    stream = Stream(network, network.model, [images], "cpu")
    for layer in network.layers:
        stream.advance(layer.node)
        window = Window(network, [layer], 2)
        before = len(calls)
        window(window.enter(stream[0]), [network.model.get_parameter(layer.parameter)])
        called, order = calls[before:], ["stem", "relu", "grouped", "gate", "fc"]
        assert all(order.index(name) >= order.index(layer.name) for name in called if name != "relu")
        del calls[before:]
    assert calls == ["stem", "bn", "relu", "grouped", "bn2", "relu", "gate"]


def test_streams_forget_what_no_later_node_reads(tiny, images):
    network = Network(tiny)
    stream = Stream(network, network.model, list(images.split(2)), "cpu")
    stream.advance(network.layers[-1].node)
    assert [len(stream[i]) for i in range(len(stream))] == [1, 1, 1]


class Statement(nn.Module):
    """In-place operations written as statements: the old name is read afterwards."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.next = nn.Conv2d(2, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        self.relu(x)
        x.mul_(2).add_(1)
        F.relu(x, inplace=True)
        torch.relu_(x)
        return self.next(x)


def test_in_place_operations_keep_their_meaning_without_writing():
    model = randomise(Statement())
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    network = Network(model)
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(network.nodes[-1])
    torch.testing.assert_close(stream[0][network.output], model(images))
    window = Window(network, [network.layers[0]], 1)
    pre, post = window({network.input: images}, [model.conv.weight])
    torch.testing.assert_close(pre, model.conv(images))  # not overwritten by the ReLU behind it
    torch.testing.assert_close(post, model.conv(images).relu())


def test_a_weight_used_twice_is_one_layer_and_follows_both_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    model, weight = randomise(Twice()), torch.randn(2, 2, 1, 1, dtype=torch.float64)
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    network = Network(model)
    assert [layer.name for layer in network.layers] == ["conv"]
    got = Window(network, [network.layers[0]], 1)({network.input: images}, [weight])[-1]
    model.conv.weight.data = weight
    torch.testing.assert_close(got, model(images))


def test_weights_read_by_a_function_are_layers_and_standardised_weights_are_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.standard = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            x = F.conv2d(x, self.plain.weight, self.plain.bias)
            return F.conv2d(x, self.standard.weight - self.standard.weight.mean())

    model, weight = randomise(Functional()), torch.randn(2, 2, 1, 1, dtype=torch.float64)
    images = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    network = Network(model)
    assert [layer.name for layer in network.layers] == ["plain"]
    assert "goes into mean" in network.refused["standard"]
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(network.layers[0].node)
    window = Window(network, [network.layers[0]], 1)
    got = window(window.enter(stream[0]), [weight])[-1]
    model.plain.weight.data = weight
    torch.testing.assert_close(got, model(images))


def test_a_model_that_cannot_be_traced_names_the_module():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"cannot trace 1 \(Branch\)"):
        Network(nn.Sequential(nn.Conv2d(2, 2, 1), Branch()))


def test_the_callers_model_is_left_alone(tiny, images):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    Network(tiny)
    assert tiny.relu.inplace
    assert tiny.stem.weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not any(module._forward_hooks for module in tiny.modules())
    assert isinstance(tiny, TinyCNN)


def test_a_stream_never_holds_more_than_what_is_still_to_be_read():
    """A whole pass of a deep network needs the memory of its widest place, not of all its features."""
    model = randomise(nn.Sequential(*(nn.Linear(64, 64) for _ in range(30))))
    network = Network(model)
    alive, most = weakref.WeakSet(), []

    def count(module, args, output):
        alive.add(output)
        most.append(len(alive))

    handles = [module.register_forward_hook(count) for module in network.model]
    stream = Stream(network, network.model, [torch.randn(2, 64, dtype=torch.float64)], "cpu")
    stream.advance(network.nodes[-1])
    for handle in handles:
        handle.remove()
    assert len(most) == 30
    assert max(most) <= 2


def test_views_are_taken_whatever_the_layout_of_the_images(images):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(64, 3)

        def forward(self, x):
            x = x.view(-1, 2, 4, 4).view_as(x).view(x.dtype)
            x = torch.relu(self.conv(x))
            return self.head(x.view(x.size(0), -1))

    model = randomise(Flat())
    pruned = snows.prune(model, images, snows.NM(1, 2), snows.Options(batch_size=2))
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)


def test_a_value_that_an_in_place_module_overwrites_is_read_as_it_was_left(images):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.conv1, self.relu = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.conv(x)
            return self.relu(self.conv1(self.relu(x)) + x).mean((2, 3))  # x has been through the ReLU

    model = randomise(Overwriting())
    pruned = snows.prune(model, images, snows.NM(1, 2), snows.Options(batch_size=2))
    assert pruned.model.relu.inplace
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)


@pytest.mark.parametrize("outputs", [4, 6])
def test_a_batch_norm_over_tokens_is_no_part_of_the_linear_map_before_it(outputs):
    """BatchNorm1d takes dimension 1 for the channels: of (images, tokens, features), the tokens."""
    model = randomise(nn.Sequential(nn.Flatten(2), nn.Linear(9, outputs), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten()))
    images = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = Network(model)
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(network.layers[0].node)
    window = Window(network, [network.layers[0]], k_step=9)
    torch.testing.assert_close(window(window.enter(stream[0]), [model[1].weight])[-1].flatten(1), model(images))


IN_PLACE = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in (torch, F, torch.Tensor)
    for name in sorted(dir(space))
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__") and callable(getattr(space, name))
}
OTHER = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ARGUMENTS = [(), (0.3,), (0.2, 0.8), (OTHER,), (2,), (0, 1), (0, OTHER > 0.5), (OTHER > 0.5, 0.0), (OTHER, OTHER)]
ARGUMENTS += [(OTHER, 0.5), (0.5, True), (0, torch.tensor([1]), 0.5)]
MAY_CHANGE_SHAPE = {"resize_", "set_", "sparse_resize_", "sparse_resize_and_clear_", "share_memory_", "apply_", "map_"}


class Written(nn.Module):
    """Something writes into what a convolution computed, and the old name is read afterwards."""

    def __init__(self, write):
        super().__init__()
        self.conv, self.head, self.write = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), write

    def forward(self, x):
        x = self.conv(x).sigmoid()
        self.write(x)
        return self.head(x)


def check_written(write, images):
    """Whether a function that can be called so leaves every value of the line as it was computed."""
    model = randomise(Written(write))
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            expected = model(images)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return False
    network = Network(model)
    values, kept = {network.input: images}, {}
    torch.manual_seed(0)
    for node in network.nodes[1:-1]:
        values[node] = run_node(node, network.model, values, {})
        kept[node] = copy.deepcopy(values[node].detach())
    for node, value in kept.items():
        torch.testing.assert_close(values[node], value, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(values[network.output], expected, equal_nan=True)
    return True


@pytest.mark.filterwarnings("ignore")
def test_no_function_of_torchs_stays_in_place():
    images = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    done = set()
    for name, function in IN_PLACE.items():
        if name.split(".")[-1] in MAY_CHANGE_SHAPE:
            continue
        by_name = getattr(torch.Tensor, name.split(".")[-1], None) if "Tensor" in name else None
        for args in ARGUMENTS:
            called = name.split(".")[-1]

            def write(x, function=function, args=args, by_name=by_name, called=called):
                return getattr(x, called)(*args) if by_name is not None else function(x, *args)

            if check_written(write, images):
                done.add(called)
                break
    assert {"leaky_relu_", "elu_", "hardtanh_", "rrelu_", "celu_", "selu_", "relu_", "threshold_"} <= done
    assert {"zero_", "fill_", "copy_", "clamp_", "masked_fill_", "index_fill_", "normal_", "add_"} <= done
    assert len(done) > 100


WRITES = {
    "flag": lambda x: F.elu(x, 0.5, True),
    "flag by keyword": lambda x: F.hardtanh(x, inplace=True),
    "out": lambda x: torch.mul(x, 3, out=x),
}


@pytest.mark.parametrize("kind", WRITES)
def test_nor_does_what_writes_otherwise(kind):
    images = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert check_written(WRITES[kind], images)


class Options(nn.Module):
    """A forward pass that reads its optional arguments, whatever they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x, *more, scale=2.0, **options):
        x = torch.relu(self.conv(x)) * options.get("gain", scale)
        for other in more:
            x = x + other
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("build", [Options, lambda: nn.Sequential(nn.DataParallel(Options()))], ids=["own", "parallel"])
def test_optional_arguments_have_their_defaults_and_data_parallel_is_what_it_holds(build, images):
    model = randomise(build())
    pruned = snows.prune(model, images, snows.NM(1, 2))
    prefix = "" if isinstance(model, Options) else "0.module."
    assert list(pruned.masks) == [f"{prefix}conv", f"{prefix}head"]
    assert type(pruned.model) is type(model)
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)


@pytest.mark.parametrize("forward", [lambda self: 0, lambda self, x, mask: x, lambda self, x, *, mask: x])
def test_a_forward_that_takes_something_else_than_images_is_refused(forward):
    with pytest.raises(TraceError, match=r"its forward\(\) needs more than the images"):
        Network(type("Other", (nn.Module,), {"forward": forward})())
