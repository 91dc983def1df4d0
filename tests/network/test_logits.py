"""Networks that return more than logits, or keep something for their next forward pass, are pruned like others."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from helpers import TinyCNN, randomise
from torch import nn

import snows
from snows.deploy.deployable import Deployable
from snows.deploy.exports import export
from snows.network.logits import logits_of
from snows.zoo.evaluate import score

Both = namedtuple("Both", "loss logits")
KINDS = {
    "dict": lambda logits: {"logits": logits, "features": 2 * logits},
    "mapping": lambda logits: OrderedDict(logits=logits),
    "object": lambda logits: SimpleNamespace(features=2 * logits, logits=logits),
    "named tuple": lambda logits: Both(None, logits),
}


class Returns(TinyCNN):
    """What it returns holds the logits; asking for an image's size makes it a network for real images."""

    kind = "dict"
    asks = False

    def forward(self, x):
        if self.asks and x.shape[-1] != 4:
            raise ValueError("images of another size")
        return KINDS[self.kind](super().forward(x))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_may_return_what_holds_its_logits(tiny, images, kind, asks):
    model = Returns().double()
    model.load_state_dict(tiny.state_dict())
    model.kind, model.asks = kind, asks
    found, wanted = (snows.prune(each.eval(), images, snows.NM(1, 2), snows.Options()) for each in (model, tiny))
    assert all(map(torch.equal, found.model.parameters(), wanted.model.parameters()))
    own = found.model(images)
    assert type(own) is type(model(images))
    torch.testing.assert_close(logits_of(own), wanted.model(images))
    batches = [(images, torch.tensor([0, 1, 2, 0, 1]))]
    assert score(found.model, batches, "cpu")[0] == score(wanted.model, batches, "cpu")[0]


def test_it_is_permuted_and_exported_with_its_logits(tiny, images, tmp_path):
    model = Returns()
    model.load_state_dict(tiny.state_dict())
    permuted = snows.permute(model.eval(), snows.NM(2, 4), example=images.float()).model
    torch.testing.assert_close(permuted(images.float())["logits"], model(images.float())["logits"])
    pruned = snows.prune(model, None, snows.NM(1, 2), algo="MP")
    batches = [(images.float(), torch.tensor([0, 1, 2, 0, 1]))]
    found = export(
        Deployable(pruned.model, pruned.masks, lambda: batches, lambda: images), "pt2", tmp_path / "model.pt2"
    )
    assert found.same_class == found.images == 5
    assert found.zeros_found == found.zeros_asked


@pytest.mark.parametrize("returned", [lambda logits: (logits, logits), lambda logits: {"out": logits}])
def test_what_holds_no_logits_is_refused_in_a_line(tiny, images, returned, monkeypatch):
    monkeypatch.setitem(KINDS, "dict", returned)
    with pytest.raises(
        snows.TraceError, match=r"must return one tensor, the logits, or something with .* named logits"
    ):
        snows.prune(Returns().double(), images, snows.NM(1, 2))


class Remembers(nn.Module):
    """An attention bias that a first forward pass computes of a parameter, and later ones read."""

    def __init__(self, way):
        super().__init__()
        self.first, self.head, self.bias = nn.Linear(16, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(8))
        self.way, self.cache, self._cache, self.value = way, {}, {}, None

    def remembered(self):
        if self.way in ("dict", "private"):
            cache = self.cache if self.way == "dict" else self._cache
            if "bias" not in cache:
                cache["bias"] = self.bias[[1, 0, 2, 3, 4, 5, 6, 7]]
            return cache["bias"]
        if self.way == "attribute":
            if self.value is None:
                self.value = 2 * self.bias
            return self.value
        if not hasattr(self, "late"):
            self.late = 2 * self.bias
        return self.late

    def forward(self, x):
        (n, *_) = x.shape
        return self.head(torch.relu(self.first(x[:, 0].reshape(n, 16)) + self.remembered()))


@pytest.mark.parametrize("way", ["dict", "private", "attribute", "new"])
def test_what_a_forward_pass_remembers_of_the_trace_is_forgotten(way, images):
    model = randomise(Remembers(way))
    pruned = snows.prune(model, images, snows.NM(1, 2), snows.Options(min_samples=0.0))
    assert not pruned.problems
    assert set(pruned.masks) == {"first", "head"}
    assert (model.cache, model._cache, model.value, hasattr(model, "late")) == ({}, {}, None, False)
    expected = randomise(Remembers(way))
    expected.load_state_dict(pruned.model.state_dict())
    torch.testing.assert_close(pruned.model(images), expected(images))
    again = snows.prune(pruned.model, images, snows.NM(1, 2), algo="MP")  # which has been run, and remembers
    torch.testing.assert_close(again.model(images), expected(images))
