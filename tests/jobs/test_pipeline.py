"""Whole jobs on tiny networks: what is promised is what comes back."""

from functools import partial
from itertools import groupby

import pytest
import timm
import torch
import torchvision
from helpers import TinyCNN, randomise
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

import snows
from snows.calibration.images import gather
from snows.calibration.streams import Streams
from snows.cli.run_folder import layer_rows
from snows.methods import snows_with
from snows.schedule import sweeps
from snows.solve.curvature import Curvature
from snows.solve.solver import solve


def fast(**changes):
    return snows.Options(**{"batch_size": 2, "schedule": 0, "joint_steps": 0, "min_samples": 0, **changes})


@pytest.mark.parametrize("algo", ["MP", "MP+", "SNOWS"])
@pytest.mark.parametrize("pattern", [snows.NM(1, 2), snows.Unstructured(0.6)], ids=str)
def test_the_returned_model_is_the_one_that_was_solved(tiny, images, algo, pattern):
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    pruned = snows.prune(tiny, images, pattern, fast(), algo=algo)
    assert type(pruned.model) is TinyCNN
    assert all(torch.equal(before[name], p) for name, p in tiny.named_parameters())  # the caller's own is untouched
    for layer in pruned.layers:
        weight, mask = pruned.model.get_submodule(layer.name).weight, pruned.masks[layer.name]
        assert (weight[~mask] == 0).all()
        assert layer.sparsity == (weight == 0).double().mean().item() >= 0.4
        if algo == "MP":
            assert torch.equal(weight, before[f"{layer.name}.weight"] * mask)
        else:
            assert layer.loss_after <= layer.loss_before
            assert layer.name == "stem" or not torch.equal(weight, before[f"{layer.name}.weight"] * mask)
    zeros = sum((p == 0).sum().item() for p in pruned.model.parameters())
    assert pruned.sparsity == zeros / sum(p.numel() for p in pruned.model.parameters())
    assert {layer.name for layer in pruned.layers} == set(pruned.masks)
    assert not set(pruned.left_dense) & set(pruned.masks)


class ByKeyword(TinyCNN):
    def forward(self, x):
        x = self.relu(input=self.bn(input=self.stem(input=x)))
        y = self.bn2(input=self.grouped(input=x))
        y += x
        y = self.relu(input=y)
        y = y * torch.sigmoid(input=self.gate(input=y))
        return self.fc(input=y.mean((2, 3)))


@pytest.mark.parametrize("mask_alg", ["MP", "SparseGPT", "ALPS", "OBS"])
def test_inputs_by_keyword_are_found_like_those_by_position(tiny, images, mask_alg):
    twin = ByKeyword().double().eval()
    twin.load_state_dict(tiny.state_dict())
    jobs = [snows.prune(model, images, snows.NM(1, 2), snows.Options(), mask_alg=mask_alg) for model in (tiny, twin)]
    ours, reference = (job.model.state_dict() for job in jobs)
    assert all(torch.equal(ours[name], value) for name, value in reference.items())


FAMILIES = {
    "depthwise, squeeze-excite": lambda: timm.create_model("test_efficientnet", num_classes=8),
    "concatenation": lambda: torchvision.models.DenseNet(8, (2, 3), 16, num_classes=8),
    "layer norms": lambda: timm.create_model("convnext_atto", num_classes=8, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    "groups": lambda: RegNet(BlockParams.from_init_params(3, 24, 36, 2.5, 8, se_ratio=0.25), num_classes=8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_cnns_is_pruned_and_its_loss_falls_at_every_layer(family):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    options = snows.Options(k_step=2, schedule=0, max_CG_iterations=2, batch_size=3, min_samples=0)
    pruned = snows.prune(model, torch.randn(4, 3, 32, 32), snows.NM(2, 4), options)
    weights = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert {layer.name for layer in pruned.layers} | set(pruned.left_dense) == weights
    for layer in pruned.layers:
        assert layer.loss_after < layer.loss_before
        assert layer.sparsity == 0.5
    for name, reason in pruned.left_dense.items():
        assert "depthwise" in reason or "multiple of 4" in reason
        assert torch.equal(pruned.model.get_submodule(name).weight, model.get_submodule(name).weight)


def test_more_depth_brings_the_output_closer(tiny):
    images = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dense = tiny(images)
    errors = {}
    for algo in ("MP", "MP+", "SNOWS"):
        pruned = snows.prune(tiny, images, snows.NM(1, 2), snows.Options(), algo=algo)
        errors[algo] = (pruned.model(images) - dense).norm().item()
    assert errors["SNOWS"] < errors["MP+"] < errors["MP"]


@pytest.mark.parametrize("biases", [True, False])
def test_what_is_written_is_what_was_solved(tiny, images, biases):
    """The last layer's loss, recomputed from the returned model alone, is the one that the solver reached."""
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(biases=biases))
    logits, dense = pruned.model(images), tiny(images)
    error = (logits - dense).square().sum() / dense.square().sum()
    assert error.item() == pytest.approx(pruned.layers[-1].loss_after)
    changed = [
        n
        for n, p in pruned.model.named_parameters()
        if n.endswith("bias") and not torch.equal(p, tiny.get_parameter(n))
    ]
    assert changed == (["bn.bias", "bn2.bias", "gate.bias", "fc.bias"] if biases else [])


def test_mp_plus_is_the_layer_wise_least_squares_solution():
    torch.manual_seed(0)
    model, images = randomise(nn.Sequential(nn.Flatten(), nn.Linear(8, 3))), torch.randn(50, 2, 2, 2).double()
    pruned = snows.prune(model, images, snows.NM(1, 2), fast(curvature_images=4), algo="MP+")  # solved to the end
    mask, x, dense = pruned.masks["1"], images.flatten(1), model[1].weight
    for row in range(3):
        support = mask[row]
        expected = torch.linalg.lstsq(x[:, support], x @ dense[row]).solution
        torch.testing.assert_close(pruned.model[1].weight[row, support], expected, rtol=1e-3, atol=1e-3)


def test_w_warm_starts_at_the_least_squares_solution(tiny, images):
    options = fast(w_warm=True, k_step=0, targets="same", biases=False)
    cold = snows.prune(tiny, images, snows.NM(1, 2), options.but(w_warm=False))
    warm = snows.prune(tiny, images, snows.NM(1, 2), options)
    assert warm.layers[0].loss_before < cold.layers[0].loss_before
    assert warm.layers[0].loss_before == pytest.approx(cold.layers[0].loss_after, rel=1e-3)


def test_what_a_warm_start_costs_is_counted(tiny, images, monkeypatch):
    taken, matvec = [], Curvature.matvec
    monkeypatch.setattr(Curvature, "matvec", lambda self, vector: taken.append(0) or matvec(self, vector))
    for warm in (False, True):
        taken.clear()
        pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(w_warm=warm, batch_size=5))
        assert len(taken) == pruned.curvature_products == pruned.cg_iterations
    assert len(taken) > 4


def test_128_images_at_batch_128_still_give_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    for batching in (True, False):
        options = snows.Options(batch_size=128, batching=batching, newton_steps=1, joint_steps=1)
        pruned = snows.prune(model, torch.randn(128, 2, 2, 2), snows.NM(1, 2), options)
        assert all(layer.newton_steps == 1 and layer.loss_after < layer.loss_before for layer in pruned.layers)


def test_two_sweeps_continue_where_the_first_ended(tiny, images):
    once = snows.prune(tiny, images, snows.NM(1, 2), fast(sweeps=1))
    twice = snows.prune(tiny, images, snows.NM(1, 2), fast(sweeps=2))
    count = len(once.layers)
    assert [(r.name, r.sweep) for r in twice.layers] == [(r.name, s) for s in (0, 1) for r in once.layers]
    assert [r.loss_after for r in twice.layers[:count]] == [r.loss_after for r in once.layers]
    first, second = once.layers[-1], twice.layers[-1]
    assert second.loss_before == pytest.approx(first.loss_after, rel=0.2)
    assert second.loss_before < 0.5 * first.loss_before
    assert all((twice.model.get_submodule(n).weight[~m] == 0).all() for n, m in twice.masks.items())


def test_same_seed_same_result(tiny, images):
    results = [snows.prune(tiny, images, snows.NM(1, 2), fast()).model.state_dict() for _ in range(2)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_masks_of_your_own(tiny, images):
    mask = torch.rand(4, 2, 3, 3) < 0.5
    pruned = snows.prune(tiny, images, {"grouped": mask}, fast())
    assert ((pruned.model.grouped.weight != 0) == mask).all()
    assert pruned.left_dense["stem"] == "no mask was given"
    with pytest.raises(snows.UsageError, match="nowhere"):
        snows.prune(tiny, images, {"nowhere": mask}, fast())
    with pytest.raises(snows.UsageError, match=r"grouped: \(4, 2\) for a weight \(4, 2, 3, 3\)"):
        snows.prune(tiny, images, {"grouped": mask[..., 0, 0]}, fast())


def test_calibration_comes_as_a_tensor_or_in_batches(images):
    assert torch.equal(gather(images), images)
    assert torch.equal(gather(images.split(2)), images)
    assert torch.equal(gather([(batch, "labels are not read") for batch in images.split(2)]), images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_the_images_is_refused(tiny, images, bad):
    images[3, 0, 0, 0] = bad
    with pytest.raises(snows.UsageError, match=r"1 calibration images hold NaN or infinity \(the first is number 3\)"):
        snows.prune(tiny, images, snows.NM(1, 2), fast())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [(torch.zeros(0, 2, 4, 4), "shape"), (torch.zeros(4, 4), "shape"), ([], "batches"), (["text"], "batches")],
)
def test_calibration_of_the_wrong_form_is_refused(tiny, calibration, message):
    with pytest.raises(snows.UsageError, match=message):
        snows.prune(tiny, calibration, snows.NM(1, 2), fast())


def test_nothing_to_prune_is_an_error(images):
    with pytest.raises(snows.UsageError, match="nothing to prune"):
        snows.prune(nn.Sequential(nn.ReLU()), images, snows.NM(1, 2), fast())
    with pytest.raises(snows.UsageError, match=r"nothing to prune.*not a multiple"):
        snows.prune(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), images, snows.NM(1, 2), fast())


def test_a_trace_that_froze_a_choice_is_refused(images):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = nn.Conv2d(2, 2, 1), 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * self.calls

    with pytest.raises(snows.TraceError, match="depends on data"):
        snows.prune(Frozen().double(), images, snows.NM(1, 2), fast())


def test_ctrl_c_keeps_the_finished_layers(tiny, images):
    def stop(step, job):
        if step.record.name == "grouped":
            raise KeyboardInterrupt

    with pytest.raises(snows.errors.Interrupted, match="after 2 layers") as stopped:
        snows.prune(tiny, images, snows.NM(1, 2), fast(), listener=stop)
    partial = stopped.value.result
    assert [layer.name for layer in partial.layers] == ["stem", "grouped"]
    assert (partial.model.stem.weight[~partial.masks["stem"]] == 0).all()
    assert torch.equal(partial.model.gate.weight, tiny.gate.weight)


@pytest.mark.parametrize(
    "bad",
    [
        {"k_step": -1},
        {"targets": "other"},
        {"batch_size": 0},
        {"batching": 1},
        {"damping": -1.0},
        {"newton_steps": 1.5},
        {"cg_tolerance": float("nan")},
        {"preconditioner": "magic"},
    ],
)
def test_options_are_checked_when_built(bad):
    with pytest.raises(snows.UsageError, match=next(iter(bad))):
        snows.Options(**bad)


def test_presets():
    paper = snows.Options.preset("paper", k_step=7)
    assert (paper.targets, paper.curvature, paper.batching, paper.preconditioner) == ("same", "hessian", True, "none")
    assert paper.k_step == 7
    assert snows.Options.preset("best") == snows.Options()
    fast = snows.Options.preset("fast")
    assert (fast.schedule, fast.sweeps, fast.joint_steps) == (0, 1, 0)
    assert fast.but(schedule=2, joint_steps=4) == snows.Options()
    with pytest.raises(snows.UsageError, match="preset"):
        snows.Options.preset("fastest")


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError, "[enforce fail] DefaultCPUAllocator: can't allocate memory"]
)
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tiny, images, failure, monkeypatch, caplog):
    options = snows.Options(
        batch_size=5, joint_steps=0, preconditioner="none"
    )  # whose random probes depend on the micro-batches
    expected = snows.prune(tiny, images, snows.NM(1, 2), options)
    compute, sizes = Curvature.__init__, []

    def small_memory(self, objective, theta):
        largest = max(objective.examples.sizes)
        if objective.window.layers[0].name == "grouped" and largest > 2:
            raise RuntimeError(failure) if isinstance(failure, str) else failure()
        sizes.append(largest)
        compute(self, objective, theta)

    monkeypatch.setattr(Curvature, "__init__", small_memory)
    pruned = snows.prune(tiny, images, snows.NM(1, 2), options)
    assert set(sizes[:1]) == {5}
    assert set(sizes[1:]) == {2}
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory at layer grouped: going on with micro-batches of 3 images",
        "out of memory at layer grouped: going on with micro-batches of 2 images",
    ]
    for name, weight in pruned.model.named_parameters():
        torch.testing.assert_close(weight, expected.model.get_parameter(name))


def test_out_of_memory_with_one_image_ends_in_one_line_and_other_errors_are_not_hidden(tiny, images, monkeypatch):
    def fail(error):
        def fails(self, objective, theta):
            raise error

        monkeypatch.setattr(Curvature, "__init__", fails)
        snows.prune(tiny, images, snows.NM(1, 2), snows.Options(batch_size=5))

    with pytest.raises(snows.SnowsError, match="out of memory at layer stem with one image at a time"):
        fail(torch.OutOfMemoryError())
    with pytest.raises(RuntimeError, match="something else"):
        fail(RuntimeError("something else"))


def test_a_schedule_reaches_the_target_through_nested_masks(tiny, images):
    seen = []
    options = fast(schedule=2, sweeps=2)
    listener = lambda step, job: seen.append((step.record, job.turns))  # noqa: E731
    pruned = snows.prune(tiny, images, snows.Unstructured(0.6), options, listener=listener)
    assert {n for _, n in seen} == {len(pruned.masks) * 4}
    for name, mask in pruned.masks.items():
        sparsities = [record.sparsity for record, _ in seen if record.name == name]
        assert sparsities == sorted(sparsities)
        assert sparsities[2] == sparsities[3] == (~mask).double().mean().item()
        assert torch.equal(pruned.model.get_submodule(name).weight != 0, mask)
    zeros = sum((~mask).sum().item() for mask in pruned.masks.values())
    assert zeros == round(0.6 * sum(p.numel() for p in tiny.parameters()))
    own = {name: mask.clone() for name, mask in pruned.masks.items()}
    again = snows.prune(tiny, images, own, options)  # masks of the caller's own stay as they are
    assert all(torch.equal(again.masks[name], mask) for name, mask in own.items())
    assert len(again.layers) == 4 * len(own)  # in as many passes


@pytest.mark.parametrize("solved", [0, 3, 6])
@pytest.mark.parametrize("pattern", [snows.NM(1, 2), snows.Unstructured(0.6)], ids=str)
def test_a_job_goes_on_from_its_finished_steps_to_the_same_bits(tiny, images, pattern, solved):
    """Through two sweeps and a schedule, whose masks are chosen from the weights on the way, and solved biases."""
    options, steps, names = fast(schedule=1, sweeps=2, w_warm=True), [], []
    whole = snows.prune(tiny, images, pattern, options, listener=lambda step, job: steps.append(step))
    assert len(steps) == len(whole.layers) > 6
    told = lambda step, job: names.append((step.record.name, step.replayed))  # noqa: E731
    again = snows.prune(tiny, images, pattern, options, finished=steps[:solved], listener=told)
    assert names == [(step.record.name, number < solved) for number, step in enumerate(steps)]
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in again.masks.items())
    assert again.layers[:solved] == whole.layers[:solved]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "3:4 2:4 1:4 joint"),
        ({"schedule": 0}, "1:4 joint"),
        ({"joint_stages": True}, "3:4 joint 2:4 joint 1:4 joint"),
        ({"joint_stages": True, "sweeps": 2}, "3:4 joint 2:4 joint 1:4 again joint"),
        ({"joint_stages": True, "joint_steps": 0}, "3:4 2:4 1:4"),
    ],
)
def test_the_sweeps_of_a_job(changes, expected):
    """Masks are chosen where the pattern is another one, and joint steps are of the pattern before them."""
    found, before = [], None
    for sweep in sweeps(snows.NM(1, 4), snows.Options(**changes)):
        assert not sweep.joint or (sweep.pattern, sweep.is_new) == (before, False)
        found.append("joint" if sweep.joint else str(sweep.pattern) if sweep.is_new else "again")
        before = sweep.pattern
    assert " ".join(found) == expected


def test_masks_of_the_callers_own_have_joint_steps_at_the_end_alone():
    found = sweeps({}, snows.Options(joint_stages=True))
    assert [(sweep.is_new, sweep.joint) for sweep in found] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


@pytest.mark.parametrize("solved", [0, 3, 4, 5, 7, 11])  # of two layers: none; in, behind the first joint steps; ...
@pytest.mark.parametrize("mask_alg", ["MP", "ALPS"])
def test_joint_steps_behind_each_stage(tiny, images, mask_alg, solved):
    """They start from the stage's weights and leave those that choose the next masks; a job goes on at any of them."""
    options, job = fast(schedule=2, joint_steps=1, joint_stages=True), (tiny, images, snows.NM(1, 4))
    steps = []
    whole = snows.prune(*job, options, mask_alg=mask_alg, listener=lambda step, job: steps.append(step))
    turns = [(record.sweep, record.joint) for record in whole.layers]
    assert [turn for turn, _ in groupby(turns)] == [(i, i % 2 == 1) for i in range(6)]
    assert len(turns) == 12
    assert all(record.loss_after < record.loss_before for record in whole.layers if record.joint)
    joint = {record.sweep: record.cg_iterations for record in whole.layers if record.joint}
    assert whole.cg_iterations == sum(joint.values()) + sum(r.cg_iterations for r in whole.layers if not r.joint)
    for stage in (1, 2):  # the magnitudes that the joint steps have left choose
        before = {step.record.name: step.weight for step in steps if step.record.sweep == 2 * stage - 1}
        for step in steps:
            if step.record.sweep == 2 * stage and mask_alg == "MP":
                assert step.mask.equal(snows.NM(3 - stage, 4).mask(before[step.record.name].abs()))
    again = snows.prune(*job, options, mask_alg=mask_alg, finished=steps[:solved])
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    told = [[(r.name, r.sweep, r.joint, r.products, r.loss_after) for r in each.layers] for each in (whole, again)]
    assert told[0] == told[1]


@pytest.fixture
def parted(tiny, monkeypatch):
    """A job whose joint steps need smaller micro-batches, as where memory is tight; the next sweep keeps to those."""
    fit = Streams.fit_jointly

    def fit_four(streams, layers, options):
        fit(streams, layers, options)
        if streams.batch_size > 4:
            streams.split(4)

    monkeypatch.setattr(Streams, "fit_jointly", fit_four)
    images = torch.randn(48, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tiny, images, snows.NM(1, 4), fast(batch_size=8, schedule=2, joint_steps=1, joint_stages=True)


@pytest.mark.parametrize("solved", [0, 2, 3, 4, 5, 8, 12])
def test_a_job_goes_on_with_the_micro_batches_that_joint_steps_have_left(parted, solved):
    steps = []
    whole = snows.prune(*parted, listener=lambda step, job: steps.append(step))
    assert [step.record.batch_size for step in steps] == [8] * 2 + [4] * 10
    again = snows.prune(*parted, finished=steps[:solved])
    assert [record.batch_size for record in again.layers] == [8] * 2 + [4] * 10
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_a_job_goes_on_with_the_micro_batches_that_fitted_the_joint_steps(parted, monkeypatch):
    compute, steps = Curvature.__init__, []

    def small_memory(self, objective, theta):
        if len(objective.window.layers) > 1 and max(objective.examples.sizes) > 2:
            raise MemoryError
        compute(self, objective, theta)

    with monkeypatch.context() as patched:
        patched.setattr(Curvature, "__init__", small_memory)
        snows.prune(*parted, listener=lambda step, job: steps.append(step))
    sizes = [step.record.batch_size for step in steps]
    assert set(sizes[2:4]) == {2}
    again = snows.prune(*parted, finished=steps[:4])
    assert [record.batch_size for record in again.layers[:6]] == sizes[:6]


def test_a_layer_that_failed_once_is_no_problem_once_it_is_solved(tiny, images):
    turns = []

    def flaky(objective, *job):
        turns.append([layer.name for layer in objective.window.layers])
        if len(turns) == 1 or turns[-1] == ["fc"]:
            raise FloatingPointError("the loss is not finite")
        return solve(objective, *job)

    options = fast(schedule=1, joint_steps=1)
    pruned = snows.prune(tiny, images, snows.NM(1, 4), options, algo=snows_with(flaky))
    assert pruned.layers[0].problem
    assert pruned.problems == {"fc": "the loss is not finite"}
    assert "fc" not in turns[-1]  # the joint steps go without it, and with the other
    assert turns[0][0] in turns[-1]
    problems = {row["name"]: row["problem"] for row in layer_rows(pruned.layers)}
    assert {name for name, problem in problems.items() if problem} == {"fc"}


def test_a_job_goes_on_with_the_micro_batches_that_fitted(tiny, images, monkeypatch):
    compute, steps = Curvature.__init__, []

    def small_memory(self, objective, theta):
        if max(objective.examples.sizes) > 2:
            raise MemoryError
        compute(self, objective, theta)

    options = snows.Options(batch_size=5, joint_steps=0)
    with monkeypatch.context() as patched:
        patched.setattr(Curvature, "__init__", small_memory)
        whole = snows.prune(tiny, images, snows.NM(1, 2), options, listener=lambda step, job: steps.append(step))
    assert [step.record.batch_size for step in steps] == [2] * len(steps)
    again = snows.prune(tiny, images, snows.NM(1, 2), options, finished=steps[:2])
    assert [layer.batch_size for layer in again.layers] == [2] * len(steps)
    state = whole.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_finished_steps_of_another_job_are_refused(tiny, images):
    steps = []
    snows.prune(tiny, images, snows.NM(1, 2), fast(), listener=lambda step, job: steps.append(step))
    with pytest.raises(snows.UsageError, match="is due, with its mask, and layer grouped"):
        snows.prune(tiny, images, snows.NM(1, 2), fast(), finished=steps[1:])
    steps[0].mask = ~steps[0].mask
    with pytest.raises(snows.UsageError, match="or its mask differs"):
        snows.prune(tiny, images, snows.NM(1, 2), fast(), finished=steps)


class Spoilt(Curvature):
    """One whose gradient or products are not finite."""

    def __init__(self, what, bad, *problem):
        super().__init__(*problem)
        self.what, self.bad = what, bad
        if what == "gradient":
            self.gradient[0] = bad

    def matvec(self, vector):
        return vector * self.bad if self.what == "product" else super().matvec(vector)


def broken_from(name, what, bad, patch):
    """A solver to which one layer's loss, gradient, product, preconditioner or solution is not finite."""

    def broken(objective, theta, support, precondition, options):
        if objective.window.layers[0].name != name:
            return solve(objective, theta, support, precondition, options)
        if what == "loss":
            objective.coefficients = [bad] * len(objective.coefficients)
        elif what == "step":
            precondition = lambda residual: residual * bad  # noqa: E731
        with patch.context() as patched:
            patched.setattr("snows.solve.solver.Curvature", partial(Spoilt, what, bad))
            theta, stats = solve(objective, theta, support, precondition, options)
        return theta * bad if what == "solution" else theta, stats

    return broken


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient", "product", "step", "solution"])
def test_what_is_not_finite_leaves_one_layer_masked_and_the_job_goes_on(tiny, images, what, bad, caplog, monkeypatch):
    solver = broken_from("grouped", what, bad, monkeypatch)
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(sweeps=1, joint_steps=2), algo=snows_with(solver))
    assert list(pruned.problems) == ["grouped"]
    assert "not finite" in pruned.problems["grouped"]
    assert "layer grouped keeps its masked weights" in caplog.text
    mask = pruned.masks["grouped"]
    assert torch.equal(pruned.model.grouped.weight, tiny.grouped.weight * mask)
    for layer in pruned.layers:
        assert layer.name == "grouped" or layer.loss_after < layer.loss_before
    assert all(p.isfinite().all() for p in pruned.model.parameters())


def test_a_nan_among_the_weights_is_reported_and_the_job_ends(tiny, images):
    with torch.no_grad():
        tiny.gate.weight[0, 0] = float("nan")
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(sweeps=1, k_step=1))
    assert [layer.name for layer in pruned.layers if not layer.problem] == ["stem", "grouped"]
    assert set(pruned.problems) == {"gate", "fc"}
    assert all("the loss is not finite" in problem for problem in pruned.problems.values())


def test_matrices_that_are_no_layers_are_named_where_they_are_many(caplog):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.matrix = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.first(x.flatten(1)) @ self.matrix

    snows.prune(Own(), torch.randn(4, 2, 2, 2), snows.NM(2, 4), algo="MP")
    (said,) = [record.getMessage() for record in caplog.records if "stay dense" in record.getMessage()]
    assert (
        said == "47 % of the parameters stay dense, for no Conv2d, Linear, F.conv2d or F.linear multiplies by them as "
        "they are: matrix"
    )
