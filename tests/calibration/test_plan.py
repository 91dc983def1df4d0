"""What a job will hold is known before it begins, and what does not fit is cut, written to files or computed again."""

import copy
import gc
import itertools
import weakref

import pytest
import timm
import torch
from helpers import randomise
from hypothesis import given
from hypothesis import strategies as st
from references import build_jointly
from torch import nn

import snows
from snows import budget as budgets
from snows import memory
from snows.budget import Budget, common_cap, halved_to_fit, parts_within
from snows.calibration.store import Store
from snows.calibration.streams import Streams
from snows.methods import snows_with
from snows.network import inputs
from snows.network.network import Network
from snows.solve import preconditioner
from snows.solve.curvature import Curvature
from snows.solve.joint import joint_inverses
from snows.solve.objective import reconstruction
from snows.solve.solver import solve


def cnn():
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())]
    return randomise(nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8 * 16, 4)))


def vit():
    sizes = dict(img_size=32, patch_size=2, embed_dim=16, num_heads=2, depth=2, mlp_ratio=2, num_classes=3, in_chans=8)
    return randomise(timm.create_model("vit_tiny_patch16_224", **sizes))


@pytest.mark.parametrize("make", [cnn, vit])
@pytest.mark.parametrize("k_step", [0, 3])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_what_a_micro_batch_needs_is_known_before_it_is_linearised(make, k_step, curvature):
    """Never less than what is kept, nor several times as much as that, the features and what comes and goes."""
    network, images = Network(make()), torch.randn(16, 8, 32, 32, dtype=torch.float64)
    streams = Streams(network, [images], "cpu")
    for layer in network.layers[:-1]:
        streams.advance(layer)
        options = snows.Options(k_step=k_step, curvature=curvature)
        objective = reconstruction([layer], streams.sparse, streams.dense, options)
        weight = objective.variables.pack([0.5 * network.model.get_parameter(layer.parameter)])
        targets = sum(y.nbytes for y in objective.targets(0))
        gc.collect()
        before = memory.used_memory("cpu")
        here = Curvature(objective, weight)
        kept = memory.used_memory("cpu") - before
        assert here.operators[0] is not None
        need = 16 * streams.plan.need([layer], k_step, curvature)
        several = 6 if curvature == "ggn" else 9  # of the Hessian's, much is gone when the gradient is there
        assert (
            kept <= need <= max(several * (kept + targets), 16 * streams.plan.passing, 16 * streams.plan.columns(layer))
        )
        del objective, here


@given(st.integers(1, 600), st.integers(1, 10**6), st.integers(0, 10**9))
def test_images_are_halved_until_they_fit_or_one_is_left(largest, need, room):
    images = halved_to_fit(largest, need, room)
    assert 1 <= images <= largest
    assert images == 1 or images * need <= room
    assert images == largest or (2 * images) * need > room  # no smaller than need be


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.integers(1, 5000))
def test_one_budget_is_shared_by_all_the_layers(needs, total):
    cap = common_cap(needs, total)
    taken = sum(min(need, cap) for need in needs)
    assert taken <= total
    assert cap >= max(needs) or taken > total - len(needs)  # what is left over is rounding


@pytest.mark.parametrize("most", [2**30, 600, 1])
def test_the_inverses_of_the_joint_steps_keep_to_one_budget(tiny, images, most):
    objective, dense, _ = build_jointly(tiny, images)
    mask = torch.ones_like(dense, dtype=torch.bool)
    inverses = joint_inverses(objective, dense, mask, 0, most)
    sizes = [sum(block.nbytes for _, block in inverse.blocks) for inverse, _ in inverses.blocks]
    columns = sum(len(block) * block[0, 0].nbytes for inverse, _ in inverses.blocks for _, block in inverse.blocks)
    assert sum(sizes) <= max(most, columns)  # at least the diagonal
    vector = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(0))
    assert vector @ inverses(vector) > 0


@given(st.lists(st.integers(0, 1000), max_size=9), st.integers(0, 3000))
def test_parts_hold_what_is_allowed_and_are_no_more_than_needed(sizes, total):
    parts = parts_within(sizes, total)
    assert [each for part in parts for each in range(part.start, part.stop)] == list(range(len(sizes)))
    assert all(sum(sizes[part]) <= total or part.stop - part.start == 1 for part in parts)
    for one, following in itertools.pairwise(parts):
        assert sum(sizes[one]) + sizes[following.start] > total


@pytest.mark.parametrize("most", [2**30, 4000, 1])
def test_the_second_moments_of_the_joint_steps_keep_to_the_budget_of_the_inverses(tiny, images, most, monkeypatch):
    """Layers whose moments are not held together are looked at one after the other, to the same bits."""
    objective, dense, _ = build_jointly(tiny, images)
    mask, made, held = torch.ones_like(dense, dtype=torch.bool), [], []

    def no_moment(*how):
        moment = inputs.no_moment(*how)
        made.append(weakref.ref(moment))
        held.append(sum(each().nbytes for each in made if each() is not None))
        return moment

    monkeypatch.setattr(preconditioner, "no_moment", no_moment)
    monkeypatch.setattr(preconditioner, "LAYER_INVERSES", 1)  # their diagonals alone, for any budget
    found = joint_inverses(objective, dense, mask, 0, most)
    largest = max(inputs.moment_size(layer, ones=True) * dense.element_size() for layer in objective.window.layers)
    assert len(held) == 4
    assert max(held) <= max(most, largest)
    vector = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(vector), joint_inverses(objective, dense, mask, 0)(vector))


@pytest.mark.parametrize("room", [0, 2**13, 2**40])
@pytest.mark.parametrize("index", range(4))
def test_targets_that_find_no_room_are_computed_again_to_the_same_bits(tiny, images, room, index, tmp_path):
    network, values = Network(tiny), []
    for bytes_of_host in (2**40, room):
        streams = Streams(network, list(images.split(2)), "cpu")
        streams.store = Store("cpu", host_bytes=bytes_of_host, cache_dir=str(tmp_path))
        streams.restart()
        layer = network.layers[index]
        streams.advance(layer)
        objective = reconstruction([layer], streams.sparse, streams.dense, snows.Options())
        theta = objective.variables.pack([0.5 * network.model.get_parameter(layer.parameter)])
        here = Curvature(objective, theta)
        values.append([here.loss, here.gradient, here.matvec(theta), objective.loss(theta), *objective.targets(1)])
        held = [each is not None for each in objective.examples.held]
        if bytes_of_host == 0:
            assert held == [False] * 3
        if bytes_of_host == 2**40:
            assert held == [True] * 3
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


def test_a_mini_batch_that_does_not_fit_is_solved_in_micro_batches(tiny, images):
    """One Newton step for each mini-batch, as before, however many micro-batches it takes."""
    options = snows.Options(batching=True, batch_size=3, preconditioner="none", schedule=0, joint_steps=0)
    whole = snows.prune(tiny, images, snows.NM(1, 2), options)
    taken = []

    def small(objective, *problem):
        if max(objective.examples.sizes) > 1:
            raise MemoryError
        taken.append([part.images for part in objective.mini_batches()])
        return solve(objective, *problem)

    parts = snows.prune(tiny, images, snows.NM(1, 2), options, algo=snows_with(small))
    assert taken == [[3, 2]] * 4
    for ours, reference in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_hungry_layer_does_not_cut_the_micro_batches_of_those_that_need_less():
    model = nn.Sequential(nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Conv2d(32, 4, 1), nn.Flatten())
    images = torch.randn(32, 2, 16, 16, dtype=torch.float64)

    def small(objective, *problem):
        if objective.window.layers[0].name == "0" and max(objective.examples.sizes) > 4:
            raise MemoryError
        return solve(objective, *problem)

    options = snows.Options(batch_size=32, schedule=0, sweeps=2, joint_steps=0, k_step=2)
    steps = []
    pruned = snows.prune(
        randomise(model),
        images,
        snows.NM(1, 2),
        options,
        algo=snows_with(small),
        listener=lambda step, job: steps.append(step),
    )
    assert [layer.batch_size for layer in pruned.layers] == [4, 16, 4, 16]
    for count in range(4):  # and a run that goes on cuts them alike
        again = snows.prune(model, images, snows.NM(1, 2), options, algo=snows_with(small), finished=steps[:count])
        assert [layer.batch_size for layer in again.layers] == [4, 16, 4, 16]
        assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), pruned.model.parameters(), strict=True))


def test_micro_batches_do_not_depend_on_the_machine(monkeypatch):
    network, images, sizes = Network(cnn()), torch.randn(64, 8, 32, 32, dtype=torch.float64), []
    for free in (2**33, 2**36, 2**42):
        monkeypatch.setattr(budgets, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(budgets, "MICRO_BATCH", 2**22)
        streams = Streams(network, [images], "cpu")
        for layer in network.layers:
            streams.fit(streams.plan.need([layer], 4))
            sizes.append(streams.batch_size)
    assert sizes[:5] == sizes[5:10] == sizes[10:]
    assert sizes[0] < 64


def test_what_will_be_held_is_said_before_the_first_layer(tiny, images, caplog):
    caplog.set_level("INFO", "snows")
    snows.prune(tiny, images, snows.NM(1, 2), snows.Options())
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory: ")]
    assert "5 images take up to" in line
    assert "in files" not in line


@pytest.mark.parametrize(
    "how", [{"mask_alg": "ALPS"}, {"mask_alg": "SparseGPT"}, {"algo": "SparseGPT"}, {"algo": "MP+"}]
)
def test_second_moments_are_said_and_refused_where_they_do_not_fit(how, caplog):
    caplog.set_level("INFO", "snows")
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(1024, 4), nn.ReLU(), nn.Linear(4, 2))).float()
    job = (model, torch.randn(8, 4, 16, 16), snows.NM(2, 4))
    options = snows.Options(schedule=0, joint_steps=0, max_CG_iterations=1)
    snows.prune(*job, options, **how)
    inverts = how != {"algo": "MP+"}
    size = "40.0 MiB" if inverts else "4.0 MiB"  # five of 1024 x 1024 in float64; one in float32, and of the bias
    assert f"second moments of inputs {size}" in caplog.text
    small = options.but(memory_budget=(memory.used_memory("cpu") + 20 * 2**20) / 2**30)
    if inverts:
        with pytest.raises(snows.SnowsError, match=r"widest layer's inputs take 40\.0 MiB"):
            snows.prune(*job, small, **how)
    else:
        snows.prune(*job, small, **how)


def test_a_budget_has_room_for_all_that_a_job_holds():
    for device in (2**31, 2**33, 2**36):
        for vectors in (0, 2**30):
            budget = Budget(device, device, vectors, asked=True)
            uses = budget.features("host") + budget.micro_batch + vectors + budget.all_inverses + budget.recycled_bytes
            assert uses + budget.kept(vectors) <= device or vectors > device // 2


@pytest.mark.parametrize("share", [1.5, 1.9, 4.0])
def test_a_budget_that_one_image_fits_solves_every_layer(share):
    """Also where the vectors of the joint steps leave nothing for graphs to be kept."""
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64))).float()
    images = torch.randn(8, 4, 8, 8)
    options = snows.Options(schedule=0, joint_steps=1, joint_CG_iterations=1, max_CG_iterations=1)
    network = Network(model)
    streams = Streams(network, [images], "cpu", options)
    least = streams.plan.vectors(network.layers) + 2 * streams.plan.need(network.layers, 9)
    budget = (memory.used_memory("cpu") + share * least) / 2**30
    pruned = snows.prune(model, images, snows.NM(2, 4), options.but(memory_budget=budget))
    assert not pruned.problems
    assert {layer.batch_size for layer in pruned.layers} >= {8}


@pytest.mark.parametrize("algo", ["SNOWS", "SparseGPT", "MP"])
def test_a_run_that_goes_on_cuts_its_micro_batches_as_it_would_have(tiny, images, algo, monkeypatch):
    """Whatever sets the layers, and where masks are chosen in turn."""
    monkeypatch.setattr(budgets, "MICRO_BATCH", 24000)
    options, steps = snows.Options(schedule=0, sweeps=1, joint_steps=0, batch_size=20), []
    images = images.repeat(4, 1, 1, 1)
    job = dict(mask_alg="SparseGPT", algo=algo)
    whole = snows.prune(
        tiny, images, snows.NM(1, 2), options, **job, listener=lambda step, job: steps.append(copy.deepcopy(step))
    )
    sizes = [layer.batch_size for layer in whole.layers]
    assert len(set(sizes)) > 1
    for count in range(len(steps)):
        again = snows.prune(tiny, images, snows.NM(1, 2), options, **job, finished=steps[:count])
        assert [layer.batch_size for layer in again.layers] == sizes
        assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_a_layer_that_fits_in_no_way_does_not_cut_the_others_micro_batches(tiny, images):
    def never(objective, *problem):
        if objective.window.layers[0].name == "grouped":
            raise MemoryError
        return solve(objective, *problem)

    pruned = snows.prune(
        tiny, images, snows.NM(1, 2), snows.Options(batch_size=5, joint_steps=0), algo=snows_with(never)
    )
    assert list(pruned.problems) == ["grouped"]
    assert {layer.batch_size for layer in pruned.layers} == {5}


@pytest.mark.parametrize("mask_alg", ["MP", "Wanda", "OBS"])
def test_what_does_not_fit_is_refused_before_scores_are_computed(tiny, images, mask_alg, monkeypatch):
    monkeypatch.setattr(snows.masks.choose, "scores", lambda *args: pytest.fail("computed"))
    with pytest.raises(snows.SnowsError, match="before anything was computed"):
        snows.prune(tiny, images, snows.NM(1, 2), snows.Options(memory_budget=1e-9), mask_alg=mask_alg)


def test_masks_and_checks_are_computed_in_the_precision_of_the_rest(tiny, images, monkeypatch):
    seen, scores = set(), snows.masks.saliency.scores

    def watched(*args):
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return scores(*args)

    before = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(snows.masks.choose, "scores", watched)
    options = snows.Options(precision="highest", schedule=1, joint_steps=0)
    snows.prune(tiny, images, snows.Unstructured(0.5), options, mask_alg="Wanda")
    assert seen == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before
