"""Forward passes that count, compare and unpack: traced with real images, for any number of them."""

import einops
import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from torch import nn

import snows
from snows.calibration.faithful import check_trace
from snows.calibration.stream import Stream
from snows.errors import TraceError
from snows.network.network import Network

SHAPE = (3, 8, 8)


class Attention(nn.Module):
    """Self-attention by hand; sizes are unpacked, queries, keys and values iterated over."""

    def __init__(self, dim=8, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = map(lambda t: t.reshape(b, n, self.heads, -1).transpose(1, 2), self.qkv(x).chunk(3, dim=-1))  # noqa: C417
        scores = nn.Softmax(dim=-1)(q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5)  # a module made here
        return self.out((scores @ v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), Attention(dim)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))

    def forward(self, x):
        x = self.attention(self.norm(x)) + x
        return self.mlp(self.norm2(x)) + x


class ViT(nn.Module):
    """A vision transformer; `embed` makes tokens of patches in one way or another."""

    def __init__(self, embed):
        super().__init__()
        self.embed, self.patches = embed, nn.Conv2d(3, 8, 4, stride=4)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 3)

    def forward(self, images):
        x = self.embed(self, images)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def asserting(self, images):
    n, _, h, w = images.shape
    assert h == w == 8, f"images are {h} x {w}"
    x = self.patches(images).reshape(n, -1, (h // 4) * (w // 4)).permute(0, 2, 1)
    return torch.cat([self.cls.expand(n, -1, -1), x], dim=1) + self.positions


def counting(self, images):
    x = self.patches(images).flatten(2).mT
    x = torch.cat([self.cls.repeat(len(x), 1, 1), x], dim=1)
    return x + self.positions[:, : len(x[0])] if isinstance(x, torch.Tensor) and x.ndim == 3 else x


def unpacking(self, images):
    x = self.patches(images)
    x = x.view(*x.shape[:2], x.shape[2] * x.shape[3]).transpose(1, 2)
    x = torch.cat((self.cls.expand(x.size()[0], *self.cls.shape[1:]), x), 1)
    return x + self.positions[:, : x.size(1)]


def folding(self, images):
    """Images and patches in one dimension, and back."""
    n, c, *_ = images.shape
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(n * 4, c, 4, 4)
    x = self.patches(patches).view(n, 4, 8)
    x = F.layer_norm(x, x.shape[-1:])
    x = nn.LayerNorm(8, elementwise_affine=True).to(x.dtype)(x)
    return torch.cat([x.new_zeros(n, 1, 8) + self.cls, x], dim=1) + self.positions


def with_einops(self, images):
    x = einops.rearrange(self.patches(images), "b c h w -> b (h w) c")
    cls = einops.repeat(self.cls, "1 1 d -> b 1 d", b=x.shape[0])
    x = torch.cat([cls, x], dim=1) + self.positions
    return einops.rearrange(x, "b n (h d) -> b n (d h)", h=2)


EMBEDDINGS = [asserting, counting, unpacking, folding, with_einops]


@pytest.fixture
def images():
    return torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits(network, images):
    stream = Stream(network, network.model, [images], "cpu")
    stream.advance(network.nodes[-1])
    return stream[0][network.output]


@pytest.mark.parametrize("embed", EMBEDDINGS)
@pytest.mark.parametrize("given", ["images", "a shape"])
def test_a_vision_transformer_written_by_hand_is_traced_for_any_number_of_images(embed, given, images):
    model = randomise(ViT(embed))
    with pytest.raises(TraceError, match="cannot trace"):
        Network(model)
    network = Network(model, example=SHAPE if given == "a shape" else images)
    for count in (1, 2, 7):
        torch.testing.assert_close(logits(network, images[:count]), model(images[:count]))
    inner = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in inner]
    assert [layer.name for layer in network.layers] == ["patches", *blocks, "head"]
    check_trace(network, images, 4)
    assert not network.refused
    assert model.state_dict().keys() == network.model.state_dict().keys()


def test_such_a_network_is_pruned_as_any(images):
    network = Network(randomise(ViT(asserting)), example=SHAPE)
    options = snows.Options(batch_size=4, schedule=0, joint_steps=0, min_samples=0)
    pruned = snows.prune(network, images, snows.NM(2, 4), options, mask_alg="Wanda")
    assert len(pruned.masks) == 9  # three input channels are no multiple of four
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers)
    assert type(pruned.model) is ViT


class Returning(nn.Module):
    """Operations that return several values, numbers and truth values."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x, need_weights=False)
        largest = x.max(dim=1)
        low, high = torch.aminmax(x, dim=1)
        first, *others = x.split(16, dim=1)
        total = {"sum": sum(others, first)}["sum"].mean(1)
        if x.is_floating_point() and x.dim() == len(x.shape):
            total = total + largest.values + low * high + x.unbind(1)[0] + x.numel() / len(x) / 1000
        return self.head(total)


def test_what_returns_several_values_is_taken_apart(images):
    model = randomise(Returning())
    network = Network(model, example=images)
    assert [layer.name for layer in network.layers] == ["conv", "attention.in_proj", "attention.out_proj", "head"]
    torch.testing.assert_close(logits(network, images), model(images))


def refused(model):
    with pytest.raises(TraceError) as raised:
        Network(model, example=SHAPE)
    return str(raised.value)


class Branch(nn.Module):
    def forward(self, x):
        *_, height, _width = x.shape
        x = x * height
        return x if x.sum() > 0 else -x


class ByCount(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        assert len(x) > 0
        return self.shift(x)


def test_both_obstacles_are_named_where_neither_way_leads():
    said = refused(nn.Sequential(nn.Conv2d(3, 2, 1), Branch()))
    assert "cannot trace 1 (Branch): Proxy object cannot be iterated" in said
    assert "Nor with images of 3x8x8 in 1 (Branch): what it does depends on what images show (__bool__)" in said
    assert "a number is 3 with 2 images and 4 with 3" in refused(ByCount(lambda x: x * (len(x) + 1)))
    assert "other operations" in refused(ByCount(lambda x: x if len(x) < 3 else x + x))
    assert "it loops over them" in refused(ByCount(lambda x: torch.stack([image.relu() for image in x])))
    assert "in a way that is not recorded" in refused(ByCount(lambda x: x + torch.Tensor(x)))
    assert "depends on what images show (__float__)" in refused(ByCount(lambda x: x * float(x.mean())))


def test_images_that_do_not_fit_are_said_to_not_fit():
    with pytest.raises(TraceError, match="Nor with images of 3x9x8: images are 9 x 8"):
        Network(ViT(asserting), example=(3, 9, 8))


def test_a_network_that_is_traced_with_symbols_does_not_run_for_it():
    plain = Network(randomise(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))), example=(1, 1, 1))  # would not fit
    assert [layer.name for layer in plain.layers] == ["1"]


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


@torch.jit.script
def compiled(x):
    return x * torch.sigmoid(x)


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = compiled

    def forward(self, x):
        return self.activation(x)


def padded(x):
    y = torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:], dtype=x.dtype)
    y[:, : x.shape[1]] = x
    return y.view(len(x), 2, *x.shape[1:]).sum(1)


def overwritten(x):
    y = x.clone()
    y[:, 1] = 0
    y += 1
    y[:, 0] *= 2
    return y


# What runs outside of torch's functions, writes into a part of a tensor, or makes one for so many images.
HANDLED = {
    "an autograd.Function": Swish.apply,
    "a function that torch.jit compiled": compiled,
    "a checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=True),
    "another checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False),
    "an operator of torch.ops": torch.ops.aten.relu,
    "a copy by torch.as_tensor": lambda x: torch.as_tensor(x).relu(),
    "a transform": lambda x: torch.fft.rfft2(x).abs().mean((2, 3), keepdim=True) * x,
    "numbers before a tensor": lambda x: (2 - x) / (1 + x**2) + (1 / (2 + x * x)) @ x - (-x),
    "zeros that are written into": padded,
    "places that are overwritten": overwritten,
    "ones for each image": lambda x: x + torch.ones(*x.shape, dtype=x.dtype),
    "numbers of the images": lambda x: x * torch.arange(len(x)).view(-1, 1, 1, 1),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*recommended to use")
@pytest.mark.parametrize("function", HANDLED.values(), ids=HANDLED.keys())
def test_what_a_forward_pass_calls_is_recorded_with_real_images(function, images):
    body = ByCount(function)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), body, nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(192, 2)))
    network = Network(model, example=SHAPE)
    for count in (1, 2, 7):
        torch.testing.assert_close(logits(network, images[:count]), model(images[:count]))
    assert [layer.name for layer in network.layers] == ["0", "2", "4"]
    check_trace(network, images, 4)


# Each of these ended the process when it was given what only looks like a tensor.
UNRECORDED = {
    "vmap": lambda x: torch.vmap(torch.relu)(x),
    "grad": lambda x: torch.func.grad(lambda z: z.square().sum())(x),
    "jvp": lambda x: torch.func.jvp(torch.relu, (x,), (x,))[1],
    "a constructor": lambda x: torch.Tensor(x.float()).to(x.dtype),
    "a subclass": lambda x: torch.Tensor._make_subclass(torch.Tensor, x),
    "nested tensors": lambda x: torch.nested.nested_tensor(list(x)).to_padded_tensor(0.0),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("function", UNRECORDED.values(), ids=UNRECORDED.keys())
def test_what_cannot_be_recorded_is_refused(function):
    assert "Nor with images of 3x8x8" in refused(ByCount(function))


def test_a_function_that_torch_jit_compiled_is_an_operation_without_images_too(images):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Compiled(), nn.Flatten(), nn.Linear(256, 2)))
    network = Network(model)
    torch.testing.assert_close(logits(network, images), model(images))


def test_a_program_of_torch_export_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 2))
    program = torch.export.export(model, (torch.zeros(2, 3, 8, 8),)).module()
    with pytest.raises(TraceError, match=r"cannot trace the model, a program of torch\.export: pass the network"):
        Network(program)
    assert [layer.name for layer in Network(torch.fx.symbolic_trace(model)).layers] == ["0", "2"]


def test_a_module_that_torch_jit_compiled_is_named():
    inner = torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        TraceError, match=r"cannot trace 0, a module that torch\.jit compiled: pass the one it was made"
    ):
        Network(nn.Sequential(inner, nn.Flatten(), nn.Linear(192, 2)))
