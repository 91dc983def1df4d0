"""Exports for other runtimes, where these are installed: what they compute, and where the zeros lie in their files."""

import numpy as np
import pytest
import torch
from torch import nn

import snows
from snows.deploy import onnx
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.exports import export
from snows.errors import SnowsError


class Attentive(nn.Module):
    """A stem of two convolutions, torchvision's kind of attention, and linear maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + self.mlp(tokens)).mean(1))


@pytest.fixture
def attentive():
    """Pruned to 2:4 in all but its stem, with five test images in two batches."""
    torch.manual_seed(0)
    pattern = snows.NM(2, 4)
    pruned = snows.prune(Attentive().eval(), None, pattern, algo="MP", layers=lambda name: "stem" not in name)
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5) % 4
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    return Deployable(pruned.model, pruned.masks, lambda: batches, lambda: images, pattern)


def test_onnx_is_one_file_for_any_batch_without_batchnorm(deployable, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    found = export(deployable, "onnx", file)
    assert found.largest_difference < 1e-5
    assert (found.zeros_found, found.nm_layers) == (found.zeros_asked, 4)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(str(file)).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert ([each.name for each in graph.input], [each.name for each in graph.output]) == (["images"], ["logits"])
    session = runtime.InferenceSession(str(file))
    for size in (1, 7):
        assert session.run(None, {"images": np.zeros((size, 4, 6, 6), np.float32)})[0].shape == (size, 3)


def test_onnx_in_half_keeps_the_pattern_of_attention(attentive, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    found = export(attentive, "onnx", tmp_path / "model.onnx", ExportOptions(half=True))
    assert 0 < found.largest_difference < 0.01
    assert found.zeros_found == found.zeros_asked > 0
    assert found.nm_layers == found.layers == 5


def test_what_onnx_cannot_write_is_told_in_a_line(deployable, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("No ONNX function for aten.odd\nand more")

    monkeypatch.setattr("snows.deploy.packages.find_spec", lambda name: name)
    monkeypatch.setattr("torch.onnx.export", fails)
    with pytest.raises(SnowsError, match=r"^onnx: this network cannot be written as ONNX: No ONNX function"):
        export(deployable, "onnx", tmp_path / "model.onnx")


def test_int8_keeps_zeros_and_pattern_and_the_stem_in_float(attentive, tmp_path):
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    found = export(attentive, "int8", tmp_path / "int8.xml", ExportOptions(int8_tolerance=100))
    assert found.zeros_found == found.zeros_asked > 0
    assert found.nm_layers == found.layers == 5
    assert 0 < found.largest_difference < 0.1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["int8.bin", "int8.xml"]
    kinds = {}
    for operation in openvino.Core().read_model(str(tmp_path / "int8.xml")).get_ops():
        if operation.get_type_name() in ("Convolution", "MatMul"):
            constant = operation.input_value(1).get_node()
            kinds.setdefault(operation.get_type_name(), []).append(constant.get_type_name())
    assert kinds["Convolution"] == ["Constant", "Constant"]  # float as they were; those in int8 are multiplied


def test_a_file_that_crashes_onnx_runtime_is_refused(attentive, tmp_path, monkeypatch):
    """As those of some attention in fp16 do: it would take the process with it, and all who load the file."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "LOAD", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(SnowsError, match=r"^onnx: ONNX Runtime itself crashes \(signal 11\)"):
        export(attentive, "onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
