"""How long networks take: what is run, in which order, and what is said of it; no test looks at a time."""

import itertools

import pytest
import torch
import torchvision
from helpers import TinyCNN, randomise
from torch import nn

import snows
from snows.deploy import backends, measure
from snows.deploy.backends import BACKENDS, Backend, Subject
from snows.deploy.measure import DENSE, PRUNED, Measured


class Mixed(nn.Module):
    """All that CSR products can stand for: pointwise convolutions with strides, linear maps of tokens, attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(12, 12, 1, groups=3)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.grouped(self.point(torch.relu(self.stem(x)))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


@pytest.fixture
def mixed():
    return randomise(Mixed()).float().requires_grad_(False)


@pytest.fixture
def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def halved(model):
    return snows.prune(model, None, snows.Unstructured(0.5, allocation="uniform"), algo="MP").model


def test_sparse_products_compute_what_the_network_does(mixed, images):
    pruned = halved(mixed)
    found = backends.csr(Subject(pruned, images), 1)()
    assert torch.allclose(found, pruned(images), atol=1e-5)


def test_sparse_products_stand_in_for_pointwise_and_linear_layers_with_zeros(mixed, images, monkeypatch):
    built = []

    class Spy(backends.SparseProduct):
        def __init__(self, weight, *others):
            super().__init__(weight, *others)
            built.append(tuple(weight.shape))
            assert self.weight.layout == torch.sparse_csr
            assert self.weight._nnz() == weight.count_nonzero()

    monkeypatch.setattr(backends, "SparseProduct", Spy)
    pruned = halved(mixed)
    pruned.head.weight.fill_(1.0)
    backends.csr(Subject(pruned, images), 1)
    assert built == [(12, 8, 1, 1), (36, 12), (12, 12)]


def test_sparse_products_of_a_dense_network_are_none(mixed, images):
    assert backends.csr(Subject(mixed, images), 1) is None


def recorder(turns, fails=()):
    """A backend that notes whose turn it is."""

    def build(subject, threads):
        name = DENSE if subject.model[0].weight.all() else PRUNED
        if name in fails:
            raise ValueError("no such operation\nmore of it")

        def run():
            turns.append((name, torch.get_num_threads()))
            return subject.model(subject.images)

        return run

    return Backend(build)


def pair():
    dense, pruned = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    pruned[0].weight.data[0, 0] = 0
    return {DENSE: dense, PRUNED: pruned}


def test_networks_run_in_turn_on_the_threads_that_were_asked_for():
    turns, before = [], torch.get_num_threads()
    rows = list(measure.measure(pair(), torch.randn(1, 4), {"mine": recorder(turns)}, threads=2, runs=3))
    assert turns == [("dense", 2), ("pruned", 2)] * 5  # once to compare, once to warm up, three to measure
    assert torch.get_num_threads() == before
    assert [(row.backend, row.network, row.difference, row.problem) for row in rows] == [
        ("mine", DENSE, 0.0, ""),
        ("mine", PRUNED, 0.0, ""),
    ]
    assert all(0 <= row.wall_ms <= row.median_wall_ms and 0 <= row.cpu_ms <= row.median_cpu_ms for row in rows)


def test_the_clocks_are_read_around_each_pass(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure.time, "process_time", lambda: 10 * next(clock))
    times = measure.in_turn({"one": lambda: None, "two": lambda: next(clock)}, runs=2)
    assert times == {"one": ([2000, 2000], [20000, 20000]), "two": ([3000, 3000], [30000, 30000])}


def test_a_backend_that_fails_says_why_and_the_others_run():
    turns = []
    own = {"broken": recorder(turns, fails=[PRUNED]), "mine": recorder(turns)}
    rows = {(row.backend, row.network): row for row in measure.measure(pair(), torch.randn(1, 4), own, runs=1)}
    assert rows["broken", PRUNED].problem == "ValueError: no such operation"
    assert rows["broken", PRUNED].cpu_ms is None
    assert rows["broken", DENSE].cpu_ms is not None
    assert rows["mine", PRUNED].cpu_ms is not None


def test_a_backend_whose_package_is_missing_is_left_out():
    absent = Backend(lambda subject, threads: pytest.fail("built"), needs=("no_such_package_at_all",))
    assert absent.missing == ["no_such_package_at_all"]
    assert list(measure.measure(pair(), torch.randn(1, 4), {"absent": absent}, runs=1)) == []


def test_a_difference_is_a_share_of_the_largest_logit():
    def build(subject, threads):
        return lambda: subject.model(subject.images).numpy() * 1.5

    rows = measure.measure(pair(), torch.randn(1, 4), {"wrong": Backend(build)}, runs=1)
    assert [row.difference for row in rows] == pytest.approx([0.5, 0.5])


def test_the_dense_network_differs_where_masks_have_zeros(mixed):
    pruned = snows.prune(mixed, None, snows.NM(2, 4), algo="MP")
    assert {"point", "attention.in_proj", "attention.out_proj"} <= pruned.masks.keys()
    dense = measure.refilled(pruned.model, pruned.masks)
    before, after = dict(pruned.model.named_parameters()), dict(dense.named_parameters())
    for name, weight in before.items():
        mask = pruned.masks.get(name.removesuffix(".weight").removesuffix("_weight"), torch.tensor(True))
        assert torch.equal(weight.where(mask, 0), after[name].where(mask, 0)), name
        assert after[name].isfinite().all()
    assert all(after[f"{name}.weight"].all() for name in ("point", "attention.out_proj"))
    assert (before["point.weight"] == 0).any()


def rows(**times):
    """{backend: (dense, pruned)} as what was measured."""
    return [
        Measured(backend.replace("_", " "), network, cpu_ms=value)
        for backend, pair in times.items()
        for network, value in zip((DENSE, PRUNED), pair)
    ]


def test_the_sentence_says_what_zeros_did_on_each_backend():
    said = measure.sentence(rows(torch=(10.0, 10.5), torch_CSR=(None, 5.0), mine=(10.0, 12.0)))
    assert "faster on torch CSR (5 ms, dense 10 of torch);" in said
    assert "slower on mine (12 ms, dense 10);" in said
    assert "as fast on torch (10.5 ms, dense 10)." in said
    assert "below 10% counts as none" in said


def test_without_a_pair_the_sentence_says_so():
    assert measure.sentence(rows(torch=(10.0, None))).startswith("Nothing was measured")


def test_the_runtimes_that_are_installed_compute_what_the_network_does(images):
    runtimes = {name: backend for name, backend in BACKENDS.items() if backend.needs}
    installed = [name for name, backend in runtimes.items() if not backend.missing]
    if not installed:
        pytest.skip("no runtime is installed")
    rows = list(measure.measure({PRUNED: randomise(TinyCNN()).float()}, images[:1, :2], runtimes, runs=1))
    assert [row.backend for row in rows] == installed
    for row in rows:
        if row.problem:
            assert row.problem == "this processor has no bfloat16"
        else:
            assert row.difference < (0.2 if row.backend.endswith(("bf16", "int8")) else 1e-4)


def test_torchvisions_transformer_runs_with_sparse_products():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=4).eval().requires_grad_(False)
    nn.init.normal_(vit.heads.head.weight)
    pruned, images = halved(vit), torch.randn(1, 3, 32, 32)
    found = backends.csr(Subject(pruned, images), 1)()
    assert torch.allclose(found, pruned(images), atol=1e-5)
