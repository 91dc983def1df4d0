"""Multiply-accumulates: by hand, by formula, and as torch's own counter has them."""

import pytest
import timm
import torch
import torchvision
from helpers import TinyCNN
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snows.deploy import macs
from snows.deploy.macs import NO_WEIGHT
from snows.network.attention import attention_by_parts


def convolution(module, height, width):
    """out h' w' (in / groups) kh kw, the sizes of the output by the formula of its documentation."""
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(
            (height, width), module.padding, module.dilation, module.kernel_size, module.stride, strict=True
        )
    ]
    kernel = module.kernel_size[0] * module.kernel_size[1]
    return module.out_channels * sizes[0] * sizes[1] * module.in_channels // module.groups * kernel


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 8, 1),
    ],
)
def test_a_convolution_counts_by_its_formula(module):
    network = nn.Sequential(module)
    assert macs.count(network, torch.randn(1, 4, 11, 9)) == {"0": convolution(module, 11, 9)}


def test_a_transposed_convolution_counts_its_inputs():
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))
    assert macs.count(network, torch.randn(1, 4, 5, 7)) == {"0": 5 * 7 * 4 * 3 * 9}


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_counts_every_token(bias):
    network = nn.Sequential(nn.Linear(6, 5, bias=bias))
    assert macs.count(network, torch.randn(1, 6)) == {"0": 30}
    assert macs.count(network, torch.randn(2, 7, 6)) == {"0": 2 * 7 * 30}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_counts_its_projections_and_its_products():
    tokens, width = 5, 8
    found = macs.count(SelfAttention(), torch.randn(1, tokens, width))
    assert found == {
        "attention.in_proj": tokens * 3 * width * width,
        NO_WEIGHT: 2 * tokens * tokens * width,
        "attention.out_proj": tokens * width * width,
    }


class CrossAttention(SelfAttention):
    def forward(self, x):
        return self.attention(x, x[:, :2], x[:, :2])[0]


def test_parts_of_one_weight_count_to_its_layer():
    found = macs.count(CrossAttention(), torch.randn(1, 5, 8))
    assert found["attention.in_proj"] == (5 + 2 + 2) * 64
    assert found[NO_WEIGHT] == 2 * 5 * 2 * 8


def test_zeros_of_a_weight_cost_nothing_and_activations_what_they_did():
    network = SelfAttention()
    dense = macs.count(network, torch.randn(1, 5, 8))
    with torch.no_grad():
        network.attention.in_proj_weight[:, ::2] = 0
        network.attention.out_proj.weight[0, 0] = 0
    kept = macs.remaining(network, dense)
    assert kept["attention.in_proj"] == dense["attention.in_proj"] // 2
    assert kept["attention.out_proj"] == 5 * 63
    assert kept[NO_WEIGHT] == dense[NO_WEIGHT]


def test_the_network_is_as_it_was():
    network = TinyCNN().train()
    macs.count(network, torch.randn(1, 2, 4, 4))
    assert network.training
    assert network.bn.num_batches_tracked == 0
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "timm/levit_128s"])
def test_whole_networks_count_as_torch_does(name):
    """torch counts two operations for each multiply-accumulate."""
    library, _, arch = name.rpartition("/")
    build = timm.create_model if library else torchvision.models.get_model
    with torch.device("meta"):
        network = build(arch).eval()
    images = torch.randn(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention_by_parts():
        network(images)
    assert sum(macs.count(network, images).values()) == counter.get_total_flops() // 2


def test_the_figures_that_papers_give():
    """ResNet-50's 4.1 and ViT-B/16's 17.6 billion (He et al. 2016; Touvron et al. 2021)."""
    for name, billions in (("resnet50", 4.09), ("vit_b_16", 17.56)):
        with torch.device("meta"):
            network = torchvision.models.get_model(name)
        found = sum(macs.count(network, torch.randn(1, 3, 224, 224, device="meta")).values())
        assert found == pytest.approx(billions * 1e9, rel=2e-3)
