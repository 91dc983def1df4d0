"""How many copies of the network a job holds, what of it runs, and that what comes back is a plain copy."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import TinyCNN, randomise
from torch import nn

import snows
from snows.errors import Interrupted, Unfinished

COPIES = weakref.WeakSet()


class Counted(nn.Module):
    """A module with a parameter that knows its copies."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        COPIES.add(self)

    def forward(self, x):
        return x * self.factor

    def __deepcopy__(self, memo):
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        COPIES.add(new)
        return new


class Tied(TinyCNN):
    """With a counted layer, a weight that two layers share, a buffer, and a hook."""

    def __init__(self):
        super().__init__()
        self.counted = Counted()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.dropout = nn.Dropout(0.5)
        self.seen = []
        self.bn2.register_forward_hook(note)

    def forward(self, x):
        x = self.counted(self.relu(self.bn(self.stem(x))))
        x = self.gate(self.relu(self.bn2(self.grouped(x)) + x))
        return self.two(self.one(self.dropout(self.fc(x.mean((2, 3)))))) * self.scale


def note(module, inputs, output):
    module.hooked = True


@pytest.fixture
def tied():
    COPIES.clear()
    model = randomise(Tied())
    model.train()
    return model


def fast(**changes):
    return snows.Options(**{"batch_size": 2, "schedule": 0, "joint_steps": 1, "min_samples": 0, **changes})


def held():
    gc.collect()
    return len(COPIES)


JOBS = {
    "the defaults": ({}, {}, 3),
    "a warm start": ({}, {"w_warm": True, "schedule": 1}, 3),
    "masks by the inputs": ({"mask_alg": "SparseGPT"}, {}, 3),
    "only masks": ({"algo": "MP"}, {}, 2),  # the dense network does not run
}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_holds_the_copy_at_work_and_the_dense_one_besides_the_callers(tied, images, job):
    arguments, changes, expected = JOBS[job]
    counts, models = [], []

    def count(step, job):
        counts.append(held())
        models.append(weakref.ref(job.network.model))

    pruned = snows.prune(
        *(tied, images, snows.NM(1, 2), fast(**changes)),
        listener=count,
        **arguments,
    )
    assert set(counts) == {expected}
    assert held() == 2  # the caller's and the result's
    assert all(model() is None for model in models)  # the one at work is gone
    assert pruned.model.counted in COPIES


def test_no_copy_is_made_to_see_whether_one_can_be(tied, images, monkeypatch):
    made, deepcopy = [], copy.deepcopy

    def count(value, *memo):
        made.extend([value] if isinstance(value, Tied) and not any(memo) else [])
        return deepcopy(value, *memo)

    monkeypatch.setattr(copy, "deepcopy", count)
    snows.prune(tied, images, snows.NM(1, 2), fast())
    assert len(made) == 3  # at work, dense, and the result's


@pytest.mark.parametrize("end", ["finished", "Ctrl-C", "an error"])
def test_what_comes_back_is_a_plain_copy_of_the_callers(tied, images, end):
    tied.dropout.eval()  # a mode of its own
    tied.stem.weight.requires_grad_(False)
    count = []

    def stop(step, job):
        count.append(step)
        if len(count) == 3 and end != "finished":
            raise KeyboardInterrupt if end == "Ctrl-C" else ValueError

    try:
        pruned = snows.prune(tied, images, snows.NM(1, 2), fast(), listener=stop)
    except (Interrupted, Unfinished) as stopped:
        pruned = stopped.result
    model = pruned.model
    assert type(model) is Tied
    assert model.relu.inplace
    assert model.two.weight is model.one.weight
    assert torch.equal(model.scale, tied.scale)
    assert [m.training for m in model.modules()] == [m.training for m in tied.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in tied.parameters()]
    assert list(model.state_dict()) == list(tied.state_dict())
    assert list(model.bn2._forward_hooks.values()) == [note]
    assert not hasattr(tied.bn2, "hooked")  # the caller's own has not run
    written = {name for name, p in tied.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert {name.split(".")[0] for name in written} - {"bn", "bn2"} <= set(pruned.masks)
    assert len(pruned.masks) == (4 if end == "finished" else 3)
    for name, buffer in tied.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name))


def test_the_network_that_a_step_is_told_of_computes_what_comes_back(tied, images):
    logits = []
    pruned = snows.prune(
        *(tied, images, snows.NM(1, 2), fast()), listener=lambda step, job: logits.append(job.network.model(images))
    )
    assert torch.equal(logits[-1], pruned.model.eval()(images))


@pytest.mark.parametrize("targets", ["dense", "same"])
@pytest.mark.parametrize("algo", ["SNOWS", "MP+"])
def test_the_dense_network_runs_along_the_line_only_where_its_features_are_the_targets(
    tiny, images, targets, algo, monkeypatch
):
    advance, advanced = snows.calibration.stream.Stream.advance, set()

    def watch(stream, node):
        advanced.add(id(stream.model))
        advance(stream, node)

    monkeypatch.setattr(snows.calibration.streams.Stream, "advance", watch)
    options = fast(targets=targets, sweeps=2)
    streams = []
    build = snows.pipeline.Streams
    monkeypatch.setattr(snows.pipeline, "Streams", lambda *args: streams.append(build(*args)) or streams[0])
    snows.prune(tiny, images, snows.NM(1, 2), options, algo=algo)
    ran = id(streams[0].dense_model) in advanced
    assert ran == (targets == "dense" and algo == "SNOWS")
    assert id(streams[0].network.model) in advanced
