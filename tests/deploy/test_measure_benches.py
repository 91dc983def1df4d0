"""bench/latency.py and bench/gpu_semi_structured.py, on small networks: rows of the right things, once each."""

import sys

import common
import gpu_semi_structured
import latency
import pytest
import torch
import torchvision
from deploy import stand_in
from torch import nn

from snows.deploy import semi_structured


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs a bench's main into a file of its own; returns the rows."""

    def call(module, *flags):
        out = tmp_path / "out.csv"
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, flags), "--out", str(out)])
        module.main()
        return common.read(out)

    return call


def small():
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4, bias=False))
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 16, 1, bias=False), *head)


def test_each_pattern_has_a_row_on_each_backend(bench, monkeypatch):
    monkeypatch.setattr(latency, "NETWORKS", {"small": small})
    flags = ("--networks", "small", "--backends", "torch", "torch CSR", "--runs", 1, "--pixels", 32)
    rows = bench(latency, *flags)
    assert [(row["backend"], row["pattern"]) for row in rows] == [
        (backend, pattern) for backend in ("torch", "torch CSR") for pattern in latency.PATTERNS
    ]
    assert [row["problem"] is None for row in rows] == [True] * 5 + [False] + [True] * 4
    dense = 30 * 30 * (8 * 27 + 16 * 8) + 16 * 4
    found = {row["pattern"]: row["macs"] for row in rows}
    assert found["dense"] == dense
    assert found["2:4"] == dense - (30 * 30 * 16 * 8 + 16 * 4) / 2  # the first layer's three inputs are no fours
    assert dense > found["0.8"] > found["0.9"] > found["0.95"] > 0
    assert all(row["environment"]["threads"] == row["threads"] == 1 for row in rows)
    assert len(bench(latency, *flags)) == len(rows)


def vit():
    return torchvision.models.VisionTransformer(32, 16, 1, 2, 64, 128, num_classes=10)


def test_a_layer_and_the_network_are_compared_packed_and_dense(bench, monkeypatch):
    monkeypatch.setattr(semi_structured, "check_gpu", lambda device: None)
    monkeypatch.setattr(semi_structured, "pack", stand_in.pack)
    monkeypatch.setattr(gpu_semi_structured, "SHAPES", {"mlp.0": (32, 64)})
    monkeypatch.setattr(gpu_semi_structured, "vit", vit)
    monkeypatch.setattr(gpu_semi_structured, "PIXELS", 32)
    flags = ("--device", "cpu", "--batches", 1, 2, "--dtypes", "bfloat16", "--modes", "eager", "--runs", 1)
    rows = bench(gpu_semi_structured, *flags)
    assert [(row["what"], row["batch_size"]) for row in rows] == [
        (what, batch) for what in ("mlp.0", "vit_b_16") for batch in (1, 2)
    ]
    assert all(row["difference"] < 0.05 and row["dense_ms"] > 0 and row["packed_ms"] > 0 for row in rows)
