"""Conversion to 2:4 products, with a stand-in for the GPU's: nothing is lost, and what stays dense says why."""

import pytest
import torch
import torchvision
from deploy import stand_in
from torch import nn

import snows
from snows.deploy import semi_structured
from snows.deploy.semi_structured import COLUMNS, DTYPES, ROWS, convert
from snows.errors import SnowsError, UsageError


@pytest.fixture
def gpu(monkeypatch):
    """As if the CPU were a GPU with such kernels."""
    monkeypatch.setattr(semi_structured, "check_gpu", lambda device: None)
    monkeypatch.setattr(semi_structured, "pack", stand_in.pack)


def vit():
    """torchvision's, small; its head, which begins as zeros, away from them."""
    torch.manual_seed(0)
    network = torchvision.models.VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=10).eval()
    nn.init.normal_(network.heads.head.weight)
    return network


def pruned(network, layers=lambda name: True):
    return snows.prune(network, None, snows.NM(2, 4), algo="MP", layers=layers).model


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_converted_network_computes_what_it_did(gpu, dtype):
    network, images = pruned(vit()), torch.randn(3, 3, 32, 32)
    converted = snows.semi_structured.convert(network, dtype)
    with torch.no_grad():
        found, expected = converted.model(images.to(dtype)), network(images)
    assert found.dtype == dtype
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert {p.dtype for p in network.parameters()} == {torch.float32}  # the caller's is as it was


def test_the_projections_inside_torchs_attention_are_packed(gpu):
    converted = convert(pruned(vit()))
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    parts = ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert converted.packed == [f"{block}.{part}" for block in blocks for part in parts]
    weights = dict(converted.model.named_parameters())
    assert isinstance(weights[f"{blocks[0]}.self_attention.in_proj_weight"], stand_in.Packed)
    assert converted.left_dense == {
        "conv_proj": "a convolution: the kernels multiply matrices alone",
        "heads.head": "its 10 x 64 are no multiples of 32 x 64",
    }


def test_a_layer_that_is_not_2_4_stays_dense_and_loses_nothing(gpu):
    network, images = pruned(vit(), lambda name: not name.endswith("mlp.0")), torch.randn(2, 3, 32, 32)
    weight = network.encoder.layers[0].mlp[3].weight
    weight.data[5, :3] = 1.0  # one group of four keeps three
    converted = convert(network, torch.bfloat16)
    reasons = {name: reason for name, reason in converted.left_dense.items() if ".mlp." in name}
    first, second = (f"encoder.layers.encoder_layer_{i}.mlp" for i in range(2))
    assert reasons == dict.fromkeys([f"{first}.0", f"{first}.3", f"{second}.0"], "it is not 2:4 along its inputs")
    with torch.no_grad():
        found, expected = converted.model(images.bfloat16()), network(images)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_stand_in_loses_weights_as_torch_does():
    weight = torch.ones(32, 64)
    assert stand_in.pack(weight).unpacked().sum() == weight.sum() / 2


class Transposed(nn.Module):
    """Hands a linear map an input that does not lie in one piece."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(64, 64, bias=False)
        self.shared = self.again = nn.Linear(64, 64)
        self.twice = nn.Linear(64, 64)

    def forward(self, x):
        return self.twice(self.twice(self.again(self.shared(self.mix(x.transpose(1, 2))))))


def test_inputs_are_laid_out_for_the_kernels(gpu):
    torch.manual_seed(0)
    network, images = pruned(Transposed().eval(), lambda name: name == "mix"), torch.randn(2, 64, 7)
    converted = convert(network, torch.bfloat16)
    assert converted.packed == ["mix"]
    with torch.no_grad():
        found, expected = converted.model(images.bfloat16()), network(images)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert converted.left_dense["twice"] == "what uses its weight is no single linear map"
    assert "shared" in converted.left_dense or "again" in converted.left_dense


def test_numbers_beyond_float16_stay_dense(gpu):
    network = pruned(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64)))
    network[2].weight.data[network[2].weight != 0] = 1e6
    converted = convert(network)
    assert converted.packed == ["0"]
    assert converted.left_dense == {
        "1": "its 64 x 32 are no multiples of 32 x 64",
        "2": "it has numbers beyond torch.float16",
    }


def test_a_network_that_is_not_2_4_is_refused(gpu):
    with pytest.raises(UsageError, match="no layer can be packed 2:4: 0: it is not 2:4 along its inputs"):
        convert(nn.Sequential(nn.Linear(64, 32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_other_numbers_are_refused(gpu, dtype):
    with pytest.raises(UsageError, match="take float16 or bfloat16"):
        convert(vit(), dtype)


def test_a_network_on_the_cpu_is_refused():
    with pytest.raises(UsageError, match="run on NVIDIA GPUs; the network is on cpu"):
        convert(vit())


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"capability 7\.5; 2:4 kernels need 8\.0"):
        semi_structured.check_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    semi_structured.check_gpu(torch.device("cuda"))


def test_saving_is_refused_with_the_way_out(gpu):
    converted = convert(pruned(vit()))
    with pytest.raises(SnowsError, match="cannot be saved: save the network itself, and convert it when it is loaded"):
        converted.model.state_dict()


def test_packing_is_torchs():
    """Which refuses what is not on a GPU."""
    with pytest.raises(RuntimeError, match="Only CUDA tensors"):
        semi_structured.pack(torch.zeros(32, 64, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sides_are_those_that_both_of_torchs_kernels_take(dtype):
    for kind in (torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
        sides = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
        assert ROWS % sides.sparse_min_rows == 0
        assert COLUMNS % sides.sparse_min_cols == 0
