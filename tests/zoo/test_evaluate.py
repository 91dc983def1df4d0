"""What is measured of a network on test images: accuracy, and how near it is to the dense one."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from snows import UsageError
from snows.zoo import evaluate
from snows.zoo.evaluate import Score, score

UNSTR = "CNN_pruning/unstr.py"


class Shown(nn.Module):
    """Logits that are the image's own values, in parts turned round."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        logits = x.flatten(1)
        return torch.cat([logits[:, :1] * self.factor, logits[:, 1:]], 1)


@pytest.fixture
def images():
    return torch.tensor([[3.0, 1.0], [1.0, 3.0], [4.0, 2.0], [2.0, 1.0]]).view(4, 1, 1, 2)


def test_a_network_is_measured_beside_the_dense_one(images):
    batches = [(images[:3], torch.tensor([0, 0, 0])), (images[3:], torch.tensor([1]))]
    dense, logits = score(Shown(), batches)
    assert dense == Score(accuracy=50)
    found, _ = score(Shown(0.3), batches, dense=logits)
    squares = 9 + 1 + 16 + 4
    assert found.accuracy == 25
    assert found.agreement == 25
    assert found.logit_error == pytest.approx(0.49 * squares / (squares + 1 + 9 + 4 + 1))
    assert score(Shown(), batches, dense=logits)[0] == Score(50, 100, 0)


def test_images_without_labels_have_no_accuracy_but_agree(images):
    batches = [(images, torch.full((4,), -1))]
    dense, logits = score(Shown(), batches)
    assert dense == Score()
    assert score(Shown(0.3), batches, dense=logits)[0].agreement == 25
    assert evaluate.accuracy(Shown(), batches) is None


def test_logits_that_are_no_numbers_have_no_error(images):
    batches = [(images, torch.zeros(4, dtype=torch.int64))]
    _, logits = score(Shown(), batches)
    assert score(Shown(float("inf")), batches, dense=logits)[0].logit_error is None


def test_a_label_that_the_network_has_no_class_for_is_refused(images):
    with pytest.raises(UsageError, match="the data has a label 2 but the model only 2 classes"):
        score(Shown(), [(images, torch.tensor([0, 1, 2, 0]))])


def test_every_run_tells_how_near_it_is_to_the_dense_network(script, small, tmp_path):
    np.savez(tmp_path / "alone.npz", images=np.load(small / "images.npz")["x_train"])
    flags = ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt", "--k_step", 0, "--schedule", 0]
    flags += ["--ngrads", 4, "--max_CG_iterations", 1, "--joint_steps", 0, "--skip", "layer[123].*"]
    flags += ["--target_sparsity", 0.001]
    for data in (small / "images.npz", tmp_path / "alone.npz"):
        out, _ = script(UNSTR, *flags, "--dset", data, "--out_dir", tmp_path / data.stem)
        metrics = json.loads((tmp_path / data.stem / "metrics.json").read_text())
        for which in ("masked_", ""):
            assert 0 <= metrics[f"{which}agreement"] <= 100
            assert 0 < metrics[f"{which}logit_error"] < 1
            assert (metrics[f"{which}accuracy"] is None) == (data.stem == "alone")
        assert "agreement" in out
        assert f"{metrics['logit_error']:.3g}" in out
    assert metrics["test_images"] == 4
