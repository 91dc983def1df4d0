"""The window is the network: with another weight in the caller's own model, its logits are the window's."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune

import snows
from snows.calibration import faithful
from snows.calibration.faithful import check_trace
from snows.calibration.stream import Stream
from snows.errors import SnowsError
from snows.network.attention import attention_by_parts
from snows.network.network import Network
from snows.network.tangent import Tangents
from snows.network.window import Window


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as networks of one's own have it."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class Scaled(nn.Tanh):
    def forward(self, x):
        return 3 * super().forward(x) * x.mean()


class Attention(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        output, weights = super().forward(query, key, value, **kwargs)
        return 2 * output, weights


class Squares(nn.Module):
    """What a parameter is computed from."""

    def forward(self, x):
        return x.square() + 0.5


class Block(nn.Module):
    """conv - norm - act - conv - norm - act - head, some of it changed; `extra` reads what it likes."""

    def __init__(self, norm=nn.BatchNorm2d, act=nn.Sigmoid, change=None, extra=None):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 4, 1), norm(4), act()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(4, 4, 1), norm(4), act()
        self.head, self.change, self.extra = nn.Linear(4, 3), change, extra

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        y = self.act2(self.norm2(self.conv2(x)))
        if self.extra is not None:
            y = self.extra(self, x, y)
        return self.head(y.mean((2, 3)))


class Functions(Block):
    """The same by functions on its parameters; `own` does what it likes with the first one's weight."""

    def __init__(self, own=lambda weight: weight, **kwargs):
        super().__init__(**kwargs)
        self.own = own

    def forward(self, x):
        norms = [(n.running_mean, n.running_var, n.weight, n.bias) for n in (self.norm, self.norm2)]
        x = self.act(F.batch_norm(F.conv2d(x, self.own(self.conv.weight), self.conv.bias), *norms[0]))
        y = self.act2(F.batch_norm(F.conv2d(x, self.conv2.weight), *norms[1]))
        if self.extra is not None:
            y = self.extra(self, x, y)
        return F.linear(y.mean((2, 3)), self.head.weight, self.head.bias)


class Attending(nn.Module):
    def __init__(self, kind=nn.MultiheadAttention, change=None):
        super().__init__()
        self.conv, self.attention, self.change = nn.Conv2d(2, 4, 1), kind(4, 2, batch_first=True), change
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))


def hook(name, change=lambda out: out.relu()):
    def add(model):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda m, args, out: tuple(map(change, out)) if type(out) is tuple else change(out)
        )

    return add


def pre_hook(name):
    return lambda model: model.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0].abs() + 0.1,))


def own_forward(name):
    def change(model):
        module = model.get_submodule(name)
        module.forward = lambda x: F.silu(x)

    return change


def with_act(model):
    model.norm.act = nn.ReLU()  # for whoever may call it


CASES = {
    "activation inside a BatchNorm": lambda: Block(norm=NormAct),
    "activation inside a BatchNorm of timm's that squashes channels": lambda: Block(
        norm=lambda n: timm.layers.BatchNormAct2d(n, act_layer=lambda **_: nn.Softmax(1))
    ),
    "an attribute of a BatchNorm": lambda: Block(change=with_act),
    "subclass of an activation": lambda: Block(act=Scaled),
    "computed weight of a BatchNorm": lambda: Block(
        change=lambda model: parametrize.register_parametrization(model.norm2, "weight", Squares())
    ),
    "own forward of an activation": lambda: Block(change=own_forward("act2")),
    "subclass of attention": lambda: Attending(Attention),
    "hook on attention": lambda: Attending(change=hook("attention")),
    "pruned by torch": lambda: Block(change=lambda model: torch_prune.l1_unstructured(model.conv2, "weight", 0.5)),
    "bias pruned by torch": lambda: Block(change=lambda model: torch_prune.l1_unstructured(model.conv2, "bias", 0.5)),
    "weight norm by hook": lambda: Block(change=lambda model: weight_norm(model.conv2)),
    "weight norm": lambda: Block(change=lambda model: parametrizations.weight_norm(model.conv2)),
    "spectral norm by hook": lambda: Block(change=lambda model: spectral_norm(model.conv2)),
    "functions": Functions,
    "functions, and a weight read again": lambda: Functions(extra=lambda m, x, y: y + F.conv2d(x, m.conv2.weight)),
    "functions, and a BatchNorm's bias read again": lambda: Functions(extra=lambda m, x, y: y * m.norm2.bias.mean()),
    "functions on a BatchNorm's output": lambda: Functions(extra=lambda m, x, y: m.norm2(y)),
    "weight read again": lambda: Block(extra=lambda m, x, y: y + F.conv2d(x, m.conv2.weight)),
    "bias read again": lambda: Block(extra=lambda m, x, y: y * m.conv2.bias.view(-1, 1, 1) + m.norm2.bias.mean()),
    "weight read first and used last": lambda: Block(extra=lambda m, x, y: F.conv2d(m.conv2(y), m.conv2.weight)),
}
for part in ("conv", "norm", "act", "conv2", "norm2", "head"):
    CASES[f"hook on {part}"] = lambda part=part: Block(change=hook(part))
    CASES[f"hook in front of {part}"] = lambda part=part: Block(change=pre_hook(part))
COMPUTED = {"pruned by torch", "weight norm by hook", "weight norm", "spectral norm by hook"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What timm.models.register_notrace_module does."""
    leaves = [*timm.models.get_notrace_modules(), NormAct, Scaled, Attention, Several]
    monkeypatch.setattr("snows.network.trace.get_notrace_modules", lambda: leaves)
    with attention_by_parts():  # torch's fast path has no derivatives
        yield


@pytest.fixture
def images():
    return torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def settled(model):
    """Random weights, the change made, and what its hooks compute computed."""
    randomise(model)
    if getattr(model, "change", None) is not None:
        model.change(model)
        model.change = None
    with torch.no_grad():
        model(torch.zeros(1, 2, 3, 3, dtype=torch.float64))
    return model.requires_grad_(False)


def check_layers(model, images):
    """Every layer's window and tangent pass against the model's own forward pass, at another weight and bias."""
    network = Network(model)
    stream = Stream(network, network.model, [images], "cpu")
    for seed, layer in enumerate(network.layers):
        stream.advance(layer.node)
        generator = torch.Generator().manual_seed(seed)
        names = [layer.parameter] if layer.bias is None else [layer.parameter, layer.bias]
        own = [model.get_parameter(name) for name in names]
        moves = tuple(torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in own)
        window = Window(network, [layer], 99)
        scale, shift = window.output_scale(layer), None
        if layer.bias is not None:
            shift = moves[1] if scale is None else moves[1] / scale
        at, values = own[0] + moves[0], window.enter(stream[0])
        parameters = window.parameters([at], [shift])
        found = window.run(window.nodes, values, parameters)
        primals = tuple(p + move for p, move in zip(own, moves))
        logits = lambda *p, names=names: functional_call(model, dict(zip(names, p)), (images,))  # noqa: E731
        wanted, slope = jvp(logits, primals, moves)
        torch.testing.assert_close(found[network.output], wanted)
        assert window.features[-1] is network.output
        torch.testing.assert_close(Tangents(window, found, parameters)([moves[0]], [shift])[-1], slope)
    return network


@pytest.mark.parametrize("case", CASES)
def test_the_window_is_the_network_whatever_its_modules_do(case, images):
    model = settled(CASES[case]())
    network = check_layers(model, images)
    expected = {"conv", "conv2", "head"} if isinstance(model, Block) else {"conv", "head"}
    if case in COMPUTED:
        assert network.refused == {"conv2": "its weight is computed from other parameters"}
        expected -= {"conv2"}
    assert expected <= {layer.name for layer in network.layers}
    before = network.affine
    check_trace(network, images, 4)
    assert network.affine == before
    assert expected <= {layer.name for layer in network.layers}


def test_what_is_known_is_still_replaced(images):
    for norm in (nn.BatchNorm2d, timm.layers.BatchNormAct2d):
        network = check_layers(settled(Block(norm=norm)), images)
        assert [node.target for node in network.batch_norm_of] == ["conv", "conv2"]


def test_hooks_on_the_backward_pass_do_not_change_gradients(images):
    model = settled(Block())
    expected = snows.prune(model, images, snows.NM(1, 2))
    model.conv2.register_full_backward_hook(lambda module, grads, _: tuple(10 * g for g in grads))
    pruned = snows.prune(model, images, snows.NM(1, 2))
    assert torch.equal(pruned.model.conv.weight, expected.model.conv.weight)


def test_a_window_that_computes_something_else_calls_its_batch_norms_as_they_are(images, caplog):
    """A hook on all modules is not looked for; the check finds what it does."""
    network = Network(settled(Block()))
    assert len(network.affine) == 2
    change = lambda module, args, out: out + 1 if isinstance(module, nn.BatchNorm2d) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(change)
    try:
        check_trace(network, images, 4)
    finally:
        handle.remove()
    assert not network.affine
    assert not network.batch_norm_of
    assert "its BatchNorms are called as they are: norm, norm2" in caplog.text
    assert [layer.name for layer in network.layers] == ["conv", "conv2", "head"]


def test_activations_that_rounding_turns_speak_against_no_window(images, caplog):
    """The second convolution adds what its BatchNorm takes away again, and float32 cannot hold both."""
    model = settled(Block(act=nn.ReLU)).float()
    with torch.no_grad():
        for constant in (model.conv2.bias, model.norm2.running_mean):
            constant.fill_(3e6)
        model.head.bias.fill_(1e3)  # the logits feel little of it
    network = Network(model)
    check_trace(network, images.float(), 4)
    assert len(network.affine) == len(network.batch_norm_of) == 2
    assert not caplog.records
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.float32}


def test_a_layer_whose_tangents_are_wrong_is_left_dense(images, monkeypatch, caplog):
    monkeypatch.setattr("snows.network.tangent.ELEMENTWISE_MODULES", {nn.Softmax})
    model = settled(Block(act=lambda: nn.Softmax(1)))
    pruned = snows.prune(model, images, snows.NM(1, 2), snows.Options(joint_steps=0))
    assert set(pruned.masks) == {"head"}
    assert set(pruned.left_dense) == {"conv", "conv2"}
    assert "something else in the window" in pruned.left_dense["conv"]
    assert "layer conv is left dense" in caplog.text
    assert torch.equal(pruned.model.conv.weight, model.conv.weight)


class Frozen(nn.Module):
    """Reads a weight where the trace does not see it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(18, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = dict(self.first.named_parameters())["weight"].abs().mean()
        return self.second(torch.tanh(self.first(x.flatten(1)) * hidden))


@pytest.mark.parametrize("masks", [True, False])
def test_a_layer_that_the_trace_does_not_follow_is_left_dense(images, masks, caplog):
    model = randomise(Frozen())
    pattern = {name: torch.rand(4, n) > 0.5 for name, n in (("first", 18), ("second", 4))} if masks else snows.NM(1, 2)
    pruned = snows.prune(model, images, pattern, snows.Options(schedule=1))
    assert set(pruned.masks) == {"second"}
    assert "the trace has frozen" in pruned.left_dense["first"]
    assert "layer first is left dense" in caplog.text
    assert torch.equal(pruned.model.first.weight, model.first.weight)


@pytest.mark.parametrize("rule", ["1:2", "dense"])
def test_a_rule_of_a_layer_that_the_trace_does_not_follow_is_no_mistake(images, rule):
    model = randomise(Frozen())
    for network in (model, checked := Network(model)):
        rules = snows.NM(1, 2, {"first": rule, "sec*": "1:4"})
        pruned = snows.prune(network, images, rules, snows.Options(schedule=1))
        assert set(pruned.masks) == {"second"}
        assert "the trace has frozen" in pruned.left_dense["first"]
        snows.choose_masks(checked, images, snows.NM(1, 2))  # its layer is refused from here on
    with pytest.raises(snows.UsageError, match="no prunable layer is named third"):
        snows.prune(model, images, snows.NM(1, 2, {"first": rule, "third": rule}))


class Careless(nn.Module):
    """Dropout that no one switches off."""

    def forward(self, x):
        return F.dropout(x, 0.5)


def test_logits_of_next_to_no_digits_speak_against_no_trace(monkeypatch):
    """Random weights make such, of which other layouts in memory make other numbers."""
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), torch.randn(4, 2, 2, 2)
    monkeypatch.setattr(faithful, "run_trace", lambda network, images, _: 1.5 * network.model(images))
    with pytest.raises(SnowsError, match="something else than the model"):
        check_trace(Network(model), images, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1e-40
    with pytest.raises(AssertionError):
        torch.testing.assert_close(1.5 * model(images), model(images), atol=0, rtol=1e-3)
    check_trace(Network(model), images, 0)


def test_dropout_that_is_always_on_is_named(images):
    model = randomise(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Dropout(), Careless(), nn.Flatten(), nn.Linear(36, 3)))
    with pytest.raises(snows.errors.TraceError, match=r"other logits each time.*: dropout in 2\. Dropout must be told"):
        snows.prune(model, images, snows.NM(1, 2))


class Differentiated(nn.Module):
    """A score of the gradient of its own output, as energy models have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    @torch.enable_grad()
    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.head(torch.tanh(self.conv(x)).mean((2, 3)))
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y + gradient.mean((1, 2, 3)).unsqueeze(1)


def test_a_forward_pass_that_differentiates_itself_is_refused_in_a_line(images):
    with pytest.raises(snows.errors.TraceError, match="does not run as the model does: element 0 of tensors does not"):
        snows.prune(Differentiated().double(), images, snows.NM(1, 2))


def test_a_model_that_ran_with_gradients_and_keeps_some_of_it_is_copied():
    """As LeViT keeps its attention biases."""
    model = settled(Block()).requires_grad_()
    model.cache = {"cpu": model.conv2.weight.exp(), "none": [None]}
    network = Network(model)
    assert torch.equal(network.model.cache["cpu"], model.cache["cpu"])
    assert not network.model.cache["cpu"].requires_grad
    assert model.cache["cpu"].requires_grad


class Several(nn.Module):
    """A leaf of the trace that returns (values, weights)."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.map(x)
        return x, x.softmax(1)


@pytest.mark.parametrize("item", [0, 1, slice(None)], ids=str)
def test_a_leaf_that_returns_several_values_is_no_feature_but_what_is_read_of_it_is(images, item):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.leaf, self.head = nn.Conv2d(2, 4, 1), Several(), nn.Linear(4, 4)

        def forward(self, x):
            read = self.leaf(self.conv(x))[item]
            return self.head((read[0] * read[1] if isinstance(item, slice) else read).mean((2, 3)))

    model = settled(Reading())
    pruned = snows.prune(model, images, snows.NM(1, 2), snows.Options(k_step=3))
    assert set(pruned.masks) == {"conv", "leaf.map", "head"}
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)


PIECES = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "grouped": lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
    "norm": lambda: nn.BatchNorm2d(4),
    "norm with activation": lambda: timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
    "own norm": lambda: NormAct(4),
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(1),
    "layer norm": lambda: nn.LayerNorm(3),
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
}


class Pieces(nn.Module):
    """Pieces in a row, each with what was drawn for it: a hook, a residual sum, its weight or itself used again."""

    def __init__(self, pieces):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)
        self.body = nn.ModuleList(PIECES[name]() for name, _ in pieces)
        self.also = [also for _, also in pieces]

    def forward(self, x):
        x = self.stem(x)
        for module, also in zip(self.body, self.also):
            if isinstance(module, nn.MultiheadAttention):
                tokens = x.flatten(2).transpose(1, 2)
                y = module(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (3, 3))
            else:
                y = module(x)
            if also == "residual":
                y = y + x
            if also == "again":
                y = module(torch.sigmoid(y)) if not isinstance(module, nn.MultiheadAttention) else torch.sigmoid(y)
            if also == "functional" and isinstance(module, nn.Conv2d):
                y = y * F.conv2d(x, module.weight, module.bias, padding=module.padding, groups=module.groups)
            x = y
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PIECES)), st.sampled_from(["", "hook", "residual", "again", "functional"])),
        min_size=1,
        max_size=5,
    )
)
def test_random_networks_are_their_windows(pieces):
    with pytest.MonkeyPatch.context() as patch, attention_by_parts():
        patch.setattr("snows.network.trace.get_notrace_modules", lambda: [*timm.models.get_notrace_modules(), NormAct])
        model = randomise(Pieces(pieces))
        for module, (_, also) in zip(model.body, pieces):
            if also == "hook" and not isinstance(module, nn.MultiheadAttention):
                module.register_forward_hook(lambda m, args, out: out * torch.cos(args[0]))
        images = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        network = check_layers(model.requires_grad_(False), images)
        layers = copy.copy(network.layers)
        check_trace(network, images, 3)
        assert network.layers == layers
