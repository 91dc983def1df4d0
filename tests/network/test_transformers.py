"""Transformers: attention is exact, in torchvision's modules and timm's, and its projections are layers like any."""

import importlib.util

import pytest
import torch
from helpers import ROOT, randomise
from references import build
from timm.models import beit, cait, eva, naflexvit, swin_transformer, vision_transformer, xcit
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as swin
from torchvision.models.vision_transformer import VisionTransformer

import snows
from snows.network.network import Network
from snows.solve.curvature import Curvature

TINY = dict(img_size=8, patch_size=4, embed_dim=8, num_heads=2, num_classes=3)
SWIN_V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
KINDS = {
    "torchvision": lambda: VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=3),
    "class and register tokens, LayerScale": lambda: vision_transformer.VisionTransformer(
        **TINY, depth=2, mlp_ratio=1.5, reg_tokens=2, init_values=0.5
    ),
    "post-norm": lambda: vision_transformer.VisionTransformer(
        **TINY, depth=2, mlp_ratio=1.5, block_fn=vision_transformer.ResPostBlock
    ),
    "beit": lambda: beit.Beit(**TINY, depth=1, mlp_ratio=1.5, init_values=0.5),
    "eva": lambda: eva.Eva(**TINY, depth=1, mlp_ratio=1.5, init_values=0.5, use_rot_pos_emb=True),
    "swin": lambda: swin_transformer.SwinTransformer(
        img_size=8, patch_size=2, embed_dim=4, depths=(2,), num_heads=(2,), window_size=2, num_classes=3
    ),
    "swin of torchvision": lambda: swin([2, 2], 4, [2], [2], [2, 2], num_classes=3),
    "swin v2 of torchvision": lambda: swin([2, 2], 4, [2], [2], [2, 2], num_classes=3, **SWIN_V2),
    "class attention": lambda: cait.Cait(**TINY, depth=1, mlp_ratio=1.5, depth_token_only=1),
    "cross-covariance": lambda: xcit.Xcit(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, num_classes=3),
}


def image_batch(model, n):
    size = 32 if isinstance(model, xcit.Xcit) else 8
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def utils():
    """VIT_pruning/utils.py under a name of its own: both folders have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "VIT_pruning")
        spec = importlib.util.spec_from_file_location("vit_utils", ROOT / "VIT_pruning" / "utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_every_projection_equal_the_dense_matrices_of_the_models_own_logits(kind, utils):
    """The reference knows nothing of traces and windows: it differentiates the model's own forward pass.

    A class token, a position embedding or a LayerScale missing from the line would show here.
    """
    model = randomise(KINDS[kind]())
    images = image_batch(model, 3)
    chosen = utils.chosen(["in_proj", "out_proj", "mlp"])
    layers = [(i, layer) for i, layer in enumerate(Network(model).layers) if chosen(layer.name)]
    assert len(layers) >= 4
    for i, layer in layers[:4]:
        check_products(model, images, i, layer.parameter)


def check_products(model, images, index, parameter):
    """Loss, gradient and both products of one layer against dense float64 matrices."""
    objective, _, weight = build(model, images, index, 99, "ggn")
    objective.coefficients = [0.0] * (len(objective.coefficients) - 1) + [0.7]  # the logits alone
    n, coefficient, shape = weight.numel(), objective.coefficients[-1], model.get_parameter(parameter).shape

    def logits(w):
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, {parameter: w.view(shape)}, (images,))

    def loss(w):
        return coefficient * (logits(w) - model(images).detach()).square().sum()

    jacobian = torch.autograd.functional.jacobian(logits, weight, vectorize=True).reshape(-1, n)
    hessian = torch.autograd.functional.hessian(loss, weight, vectorize=True).reshape(n, n)
    vector = torch.randn(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for curvature, matrix in (("ggn", 2 * coefficient * jacobian.T @ jacobian), ("hessian", hessian)):
        objective.options = objective.options.but(curvature=curvature)
        here = Curvature(objective, weight)
        torch.testing.assert_close(here.loss, loss(weight))
        torch.testing.assert_close(here.gradient, torch.autograd.functional.jacobian(loss, weight))
        torch.testing.assert_close(here.matvec(vector), matrix @ vector)


def test_torchvisions_attention_is_three_operations_as_timms_is():
    network = Network(randomise(KINDS["torchvision"]()))
    first = next(layer for layer in network.layers if layer.name.endswith("in_proj"))
    block = network.nodes[network.position[first.node] :]
    counted = [getattr(node.target, "__name__", node.target) for node in block if network.is_counted(node)]
    assert counted[:3] == ["linear", "scaled_dot_product_attention", "linear"]
    assert first.bias == "encoder.layers.encoder_layer_0.self_attention.in_proj_bias"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_opened_attention_is_the_modules_own(batch_first, bias):
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)

        def forward(self, x):
            return self.attention(query=x, key=x, value=x, need_weights=False)[0]

    model = randomise(SelfAttention())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    network = Network(model)
    assert [layer.name for layer in network.layers] == ["attention.in_proj", "attention.out_proj"]
    objective, weight, _ = build(model, x, 0, 0, "ggn", batch=5)
    assert objective.loss(weight) < 1e-20
    stream = snows.calibration.stream.Stream(network, network.model, [x], "cpu")
    stream.advance(network.nodes[-1])
    torch.testing.assert_close(stream[0][network.output], model(x))


def test_attention_that_cannot_be_opened_stays_one_operation_and_says_so():
    class CrossAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(self.first(x), x, x, need_weights=False)[0]

    model = randomise(CrossAttention())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    network = Network(model)
    assert [layer.name for layer in network.layers] == ["first"]
    assert set(network.refused) == {"attention.in_proj", "attention.out_proj"}
    assert "several inputs" in network.refused["attention.in_proj"]
    check_products(model, x, 0, "first.weight")
    objective, *_ = build(model, x, 0, 3, "ggn")
    assert [tuple(target.shape) for target in objective.targets(0)] == [(2, 3, 4), (2, 3, 4)]


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.Unstructured(0.2, allocation="uniform")], ids=str)
@pytest.mark.parametrize("kind", ["torchvision", "class and register tokens, LayerScale", "beit"])
def test_the_solved_projections_are_in_the_returned_model(kind, pattern, utils):
    """Queries, keys and values alike; the solution is written into the copy that is returned."""
    model = randomise(KINDS[kind]())
    images = image_batch(model, 48)
    dense, chosen = model(images), utils.chosen(["in_proj", "out_proj", "mlp"])
    errors = {}
    for algo in ("MP", "SNOWS"):
        pruned = snows.prune(model, images, pattern, snows.Options(), algo=algo, layers=chosen)
        errors[algo] = (pruned.model(images) - dense).norm()
        assert all(reason == "not selected" for reason in pruned.left_dense.values())
        for name, mask in pruned.masks.items():
            weight = next(p for n, p in pruned.model.named_parameters() if n in (f"{name}.weight", f"{name}_weight"))
            assert torch.equal(weight != 0, mask)
            for third in weight.chunk(3) if mask.shape[0] == 3 * mask.shape[1] else [weight]:
                assert 0.15 < (third == 0).double().mean() < 0.75
    assert errors["SNOWS"] < errors["MP"] / 2


NAMES = {  # network -> what in_proj, out_proj and mlp select, of some of its layers
    "torchvision": (
        ["encoder.layers.encoder_layer_0.self_attention.in_proj"],
        ["encoder.layers.encoder_layer_0.self_attention.out_proj"],
        ["encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3"],
    ),
    "timm": (["blocks.0.attn.qkv"], ["blocks.0.attn.proj"], ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
    "class attention": (["blocks_token_only.0.attn.q", "blocks_token_only.0.attn.k"], ["blocks.0.attn.proj"], []),
    "levit": (["stages.0.blocks.0.attn.qkv.linear"], ["stages.0.blocks.0.attn.proj.ln.linear"], []),
    "neither": ([], [], []),
}
OTHERS = ["patch_embed.proj", "conv_proj", "head", "blocks.0.attn.rel_pos.mlp.fc1", "shared_rel_pos.mlp.fc1"]
OTHERS += ["layers.0.blocks.0.attn.cpb_mlp.0", "blocks.0.attn.proj_l", "pos_embed.token_projection", "heads.head"]


@pytest.mark.parametrize("network", NAMES)
def test_layers_to_prune_means_the_same_for_every_library(network, utils):
    parts = dict(zip(("in_proj", "out_proj", "mlp"), NAMES[network]))
    everything = [name for names in parts.values() for name in names] + OTHERS
    for part, names in parts.items():
        assert list(filter(utils.chosen([part]), everything)) == names
    assert list(filter(utils.chosen(["*rel_pos*", "head"]), OTHERS)) == [OTHERS[2], OTHERS[3], OTHERS[4]]


@pytest.mark.parametrize("name", ["vit_digits", "vit_cifar10"])
def test_the_weights_that_ship_fit(name, utils):
    classifier = utils.KNOWN[name](True)
    assert classifier.stated_accuracy > 80
    untrained = utils.KNOWN[name](False)
    assert untrained.stated_accuracy is None
    assert not torch.equal(classifier.model.head.weight, untrained.model.head.weight)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_a_transformer_whose_embedding_returns_a_pair_is_pruned(pool):
    options = dict(patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.5, pos_embed_grid_size=(2, 2))
    model = randomise(naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**options, global_pool=pool), num_classes=3))
    options = snows.Options(k_step=2, schedule=0, min_samples=0)
    pruned = snows.prune(model, image_batch(model, 3), snows.NM(2, 4), options)
    assert "embeds.proj" in pruned.masks
    assert all(layer.loss_after < layer.loss_before for layer in pruned.layers if not layer.joint)


def test_no_layer_selected_is_an_error():
    with pytest.raises(snows.UsageError, match=r"no layer was selected of conv_proj, "):
        snows.prune(KINDS["torchvision"](), None, snows.NM(2, 4), algo="MP", layers=lambda name: False)


class Encoded(nn.Module):
    """Patches, torch's own encoder or a layer of it, and a head."""

    def __init__(self, layers=2, norm=True, nested=False, **kwargs):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 12, **kwargs)
        final = nn.LayerNorm(8) if norm else None
        self.encoder = nn.TransformerEncoder(layer, layers, final, nested) if layers else layer

    def forward(self, x):
        x = self.patches(x).flatten(2).permute(2, 0, 1)  # (tokens, n, 8)
        first = self.encoder.layers[0] if isinstance(self.encoder, nn.TransformerEncoder) else self.encoder
        if first.self_attn.batch_first:
            return self.head(self.encoder(x.transpose(0, 1)).mean(1))
        return self.head(self.encoder(src=x).mean(0))


ENCODERS = {
    "post-norm": {},
    "pre-norm, batch first, GELU": {"norm_first": True, "batch_first": True, "activation": "gelu"},
    "no biases, no last norm": {"bias": False, "norm": False, "batch_first": True},
    "nested tensors where there are masks": {"batch_first": True, "nested": True},
    "one layer": {"layers": 0, "norm_first": True},
    "one layer, post-norm": {"layers": 0, "batch_first": True},
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_linear_map_of_torchs_own_encoder_is_a_layer(kind):
    model = randomise(Encoded(**ENCODERS[kind])).requires_grad_(False)
    images = image_batch(model, 3)
    network = Network(model)
    block = "encoder.layers.{}." if isinstance(model.encoder, nn.TransformerEncoder) else "encoder."
    inner = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    blocks = [block.format(i) for i in range(ENCODERS[kind].get("layers", 2) or 1)]
    assert [layer.name for layer in network.layers] == ["patches", *(b + i for b in blocks for i in inner), "head"]
    assert len({layer.node for layer in network.layers}) == len(network.layers)
    for i, layer in enumerate(network.layers[:5]):
        check_products(model, images, i, layer.parameter)


def test_an_encoder_with_a_mask_stays_one_operation():
    class Masked(Encoded):
        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.encoder(x, mask=self.mask).mean(1))

    model = Masked(layers=1, batch_first=True)
    model.register_buffer("mask", torch.ones(4, 4).triu(1).bool())
    network = Network(randomise(model))
    assert len({layer.node for layer in network.layers if layer.name.startswith("encoder")}) == 1
    pruned = snows.prune(model, image_batch(model, 3), snows.NM(2, 4), snows.Options(schedule=0, joint_steps=0))
    assert set(pruned.masks) >= {"encoder.layers.0.linear1", "head"}
