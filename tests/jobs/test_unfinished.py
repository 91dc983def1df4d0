"""Whatever happens behind the first solved layer: what is solved is kept, the rest is reported, the job goes on."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import ROOT, OnceDifferentiable, randomise
from torch import nn
from torch.autograd import Function

import snows
from snows.errors import Interrupted, Unfinished
from snows.methods import METHODS, snows_with
from snows.result import JOINT
from snows.solve.curvature import Curvature
from snows.solve.layer import update_layer
from snows.solve.solver import SolveStats, solve


class Forward(Function):
    @staticmethod
    def forward(ctx, x):
        return x * x


@torch.library.custom_op("snows_tests::square", mutates_args=())
def custom_square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def own_square(x):
    return OnceDifferentiable.apply(x)


def square_forward(x):
    return Forward.apply(x)


def spoilt_sigmoid(x):
    return torch.sigmoid(x).mul_(2)


def square_elsewhere(x):
    return torch.from_numpy(x.numpy() ** 2)


for function in (own_square, square_forward, spoilt_sigmoid, square_elsewhere):
    torch.fx.wrap(function.__name__)

# operation -> (curvature, what the report names)
UNDERIVED = {
    "torch's, no derivative": (lambda x: torch.heaviside(x, x), "ggn", "heaviside"),
    "torch's, second derivative": (lambda x: torch.ops.aten.hardsigmoid(x), "hessian", "hardsigmoid"),
    "one's own, forward mode": (lambda x: own_square(x), "ggn", "own_square"),
    "one's own, backward": (lambda x: square_forward(x), "hessian", "square_forward"),
    "in place": (lambda x: spoilt_sigmoid(x), "ggn", "spoilt_sigmoid"),
    "numpy's": (lambda x: square_elsewhere(x), "ggn", "square_elsewhere"),
    "a custom operator": (lambda x: torch.ops.snows_tests.square(x), "ggn", "square"),
}


class Line(nn.Module):
    """Four convolutions, with an operation in front of the last."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Conv2d(2, 2, 1) for _ in range(4))
        self.operation = operation

    def forward(self, x):
        x = torch.sigmoid(self.third(torch.sigmoid(self.second(torch.sigmoid(self.first(x))))))
        return self.last(self.operation(x)).flatten(1)


def masks_of(model):
    return {name: torch.eye(2).view(2, 2, 1, 1).bool() for name, _ in model.named_children()}


def fast(**changes):
    return snows.Options(**{"batch_size": 2, "schedule": 0, "joint_steps": 0, "min_samples": 0, **changes})


@pytest.mark.parametrize("preconditioner", ["rows", "none"])
@pytest.mark.parametrize("kind", UNDERIVED)
def test_an_operation_without_a_derivative_costs_the_layers_in_front_of_it_alone(kind, images, preconditioner, caplog):
    operation, curvature, name = UNDERIVED[kind]
    model = randomise(Line(operation))
    options = fast(k_step=2, curvature=curvature, joint_steps=1, preconditioner=preconditioner)
    pruned = snows.prune(model, images, masks_of(model), options)
    assert list(pruned.problems) == ["third", JOINT]  # K = 2: behind `second` come sigmoid and `third`
    for problem, advice in ((pruned.problems["third"], "`k_step`"), (pruned.problems[JOINT], "`joint_steps` 0")):
        assert re.search(rf"torch cannot differentiate \S*{name},", problem)
        assert advice in problem
    assert "layer third keeps its masked weights" in caplog.text
    assert "the layers keep their weights" in caplog.text
    assert torch.equal(pruned.model.third.weight, model.third.weight * pruned.masks["third"])
    solved = {record.name: record for record in pruned.layers if not record.problem}
    assert list(solved) == ["first", "second", "last"]
    assert all(record.loss_after < record.loss_before for record in list(solved.values())[1:])
    joint = [record for record in pruned.layers if record.joint]
    assert [record.name for record in joint] == ["first", "second", "last"]
    assert all(record.problem for record in joint)
    alone = snows.prune(model, images, masks_of(model), options.but(joint_steps=0))
    for ours, reference in zip(pruned.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, reference)


def test_where_no_layer_can_be_solved_the_job_ends_in_the_first_ones_line(images):
    model = randomise(Line(lambda x: own_square(x)))
    with pytest.raises(snows.SnowsError, match="cannot solve layer second: torch cannot differentiate own_square") as e:
        snows.prune(model, images, snows.NM(1, 2), fast(k_step=9), layers=lambda name: name in ("second", "third"))
    assert e.value.result is None


def test_masks_by_the_loss_need_derivatives_too(images):
    model = randomise(Line(lambda x: square_forward(x)))
    with pytest.raises(snows.SnowsError, match="torch cannot differentiate square_forward"):
        snows.prune(model, images, snows.NM(1, 2), fast(k_step=2), mask_alg="OBS")


def out_of_memory_at(monkeypatch, stuck):
    """Let no micro-batch fit where `stuck` says so of an objective; returns the sizes that were tried."""
    compute, tried = Curvature.__init__, []

    def small_memory(self, objective, theta):
        if stuck(objective):
            tried.append(len(objective))
            raise torch.OutOfMemoryError
        compute(self, objective, theta)

    monkeypatch.setattr(Curvature, "__init__", small_memory)
    return tried


def test_a_layer_that_does_not_fit_keeps_its_masked_weights_and_the_job_goes_on(tiny, images, monkeypatch, caplog):
    out_of_memory_at(monkeypatch, lambda objective: objective.window.layers[0].name == "grouped")
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(joint_steps=1))
    assert list(pruned.problems) == ["grouped"]
    assert "out of memory with one image at a time" in pruned.problems["grouped"]
    assert "layer grouped keeps its masked weights" in caplog.text
    assert torch.equal(pruned.model.grouped.weight, tiny.grouped.weight * pruned.masks["grouped"])
    assert [r.name for r in pruned.layers if r.joint] == ["stem", "gate", "fc"]
    assert all(r.loss_after < r.loss_before for r in pruned.layers if not r.problem and r.name != "stem")


def test_a_stream_that_ran_out_of_memory_half_way_starts_again(tiny, images, monkeypatch):
    """At its second micro-batch, on the way to `grouped`: the first one's values are those of another cut by then."""
    advance, run_node = snows.calibration.stream.Stream.advance, snows.network.graph.run_node

    def stops(stream, node):
        seen = []

        def no_memory(step, *args):
            seen.append(step)
            if node.name == "grouped" and seen.count(step) == 2:
                raise MemoryError
            return run_node(step, *args)

        with monkeypatch.context() as patched:
            patched.setattr(snows.network.graph, "run_node", no_memory)
            advance(stream, node)

    monkeypatch.setattr(snows.calibration.stream.Stream, "advance", stops)
    pruned = snows.prune(tiny, images, snows.NM(1, 2), fast(batch_size=1))
    assert list(pruned.problems) == ["grouped"]
    assert [r.name for r in pruned.layers if r.loss_after < r.loss_before] == ["stem", "gate", "fc"]


def test_joint_steps_that_do_not_fit_are_left_out(tiny, images, monkeypatch, caplog):
    tried = out_of_memory_at(monkeypatch, lambda objective: len(objective.window.layers) > 1)
    steps = []
    job = (tiny, images, snows.NM(1, 2))
    pruned = snows.prune(*job, fast(joint_steps=2), listener=lambda step, job: steps.append(step))
    assert tried == [3, 5]  # until there is one image in each
    assert list(pruned.problems) == [JOINT]
    assert "`joint_steps` 0" in pruned.problems[JOINT]
    assert "the layers keep their weights: out of memory at the joint steps" in caplog.text
    alone = snows.prune(*job, fast())
    again = snows.prune(*job, fast(joint_steps=2), finished=steps[:6])  # and two more, behind an interruption
    for result in (pruned, again):
        assert [r.joint for r in result.layers] == [False] * 4 + [True] * 4
        for ours, reference in zip(result.model.parameters(), alone.model.parameters(), strict=True):
            assert torch.equal(ours, reference)


@pytest.mark.parametrize("error", [RuntimeError("something else"), KeyError("what"), AssertionError()])
def test_any_other_error_holds_the_finished_layers(tiny, images, error):
    def breaks(objective, *problem):
        if objective.window.layers[0].name == "gate":
            raise error
        return solve(objective, *problem)

    whole = snows.prune(tiny, images, snows.NM(1, 2), fast())
    with pytest.raises(Unfinished, match=f"unexpected {type(error).__name__} after 2 layers") as stopped:
        snows.prune(tiny, images, snows.NM(1, 2), fast(), algo=snows_with(breaks))
    assert stopped.value.__cause__ is error
    assert stopped.value.exit_code == 1
    partial = stopped.value.result
    assert [record.name for record in partial.layers] == list(partial.masks) == ["stem", "grouped"]
    for name in ("stem", "grouped"):
        assert torch.equal(partial.model.get_submodule(name).weight, whole.model.get_submodule(name).weight)
    assert torch.equal(partial.model.gate.weight, tiny.gate.weight)
    with pytest.raises(type(error)):  # with nothing solved there is nothing to keep
        snows.prune(tiny, images, snows.NM(1, 2), fast(), algo=snows_with(breaks), layers=lambda name: name == "gate")


def test_errors_that_the_user_can_mend_hold_the_finished_layers_too(tiny, images):
    def wrong(objective, theta, *problem):
        return theta if objective.window.layers[0].name == "stem" else theta[:1], SolveStats()

    with pytest.raises(snows.UsageError, match="the solver must return a theta") as stopped:
        snows.prune(tiny, images, snows.NM(1, 2), fast(), algo=snows_with(wrong))
    assert [record.name for record in stopped.value.result.layers] == ["stem"]


def test_an_unexpected_error_in_a_script_saves_the_finished_layers_and_says_how_to_go_on(script, tmp_path, monkeypatch):
    def breaks(layer, *problem):
        if layer.name == "layer1.0.conv1":
            raise ValueError("something else")
        return update_layer(layer, *problem)

    folder = tmp_path / "run"
    flags = ["--k_step", 1, "--max_CG_iterations", 1, "--ngrads", 8, "--schedule", 0, "--joint_steps", 0]
    flags += ["--skip_evaluation", "--out_dir", folder]
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "SNOWS", replace(METHODS["SNOWS"], update=breaks))
        _, err = script("CNN_pruning/unstr.py", *flags, code=1)
    assert len(err.strip().splitlines()) == 1
    assert "unexpected ValueError after 1 layers: something else" in err
    assert f"saved in {folder}" in err
    assert f"--resume {folder}" in err
    assert json.loads((folder / "metrics.json").read_text())["finished"] is False
    assert len(json.loads((folder / "layers.json").read_text())) == 1
    script("CNN_pruning/unstr.py", "--resume", folder)


def test_a_reader_who_leaves_is_no_defect(tmp_path):
    flags = ["--k_step", "1", "--max_CG_iterations", "1", "--ngrads", "8", "--skip_evaluation"]
    command = [sys.executable, "-u", str(ROOT / "CNN_pruning" / "unstr.py"), *flags, "--out_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stdout if " zero " in line)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1
    assert err == "error: nobody reads the output any more\n"


def test_a_layer_that_a_later_sweep_solves_takes_part_in_the_joint_steps(tiny, images):
    """And one that only the earlier sweep solved does not."""
    turns = []

    def solver(objective, *problem):
        names = [layer.name for layer in objective.window.layers]
        turns.append(names)
        if names == (["grouped"] if len(turns) <= 4 else ["gate"]):
            raise FloatingPointError("the loss is not finite")
        return solve(objective, *problem)

    steps = []
    job = (tiny, images, snows.NM(1, 2), fast(sweeps=2, joint_steps=1))
    pruned = snows.prune(*job, algo=snows_with(solver), listener=lambda step, job: steps.append(step))
    assert turns[-1] == ["stem", "grouped", "fc"]
    assert set(pruned.problems) == {"gate"}
    again = snows.prune(*job, finished=steps)
    for ours, reference in zip(again.model.parameters(), pruned.model.parameters(), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("value", [1.0, 1e-30])
def test_what_a_solver_does_off_the_support_is_undone_and_said(tiny, images, biases, value, caplog):
    def careless(objective, theta, support, *problem):
        theta, stats = solve(objective, theta, support, *problem)
        return theta + value * ~support, stats

    options = fast(biases=biases, joint_steps=1)
    pruned = snows.prune(tiny, images, snows.NM(1, 2), options, algo=snows_with(careless))
    reference = snows.prune(tiny, images, snows.NM(1, 2), options)
    for name, mask in pruned.masks.items():
        assert not pruned.model.get_submodule(name).weight[~mask].any()
        assert f"weights off the support of layer {name}" in caplog.text
    for ours, theirs in zip(pruned.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(pruned.layers, reference.layers, strict=True):  # the loss of what is written
        assert ours.loss_after == pytest.approx(theirs.loss_after)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda theta, stats: theta, r"must return \(theta, snows.solve.solver.SolveStats\), not Tensor"),
        (lambda theta, stats: None, r"must return \(theta, snows.solve.solver.SolveStats\), not NoneType"),
        (lambda theta, stats: (None, stats), "not NoneType, SolveStats"),
        (lambda theta, stats: (theta, None), "not Tensor, NoneType"),
        (lambda theta, stats: (theta.view(4, 19), stats), r"\(76,\).*not \(4, 19\)"),
        (lambda theta, stats: (theta[1:], stats), r"not \(75,\)"),
        (lambda theta, stats: (theta.float(), stats), r"torch.float64.*not.*torch.float32"),
        (lambda theta, stats: (theta.to("meta"), stats), "on cpu.*on meta"),
    ],
)
def test_a_solver_that_gives_back_no_solution_is_told_so(tiny, images, spoil, message):
    def solver(*problem):
        return spoil(*solve(*problem))

    with pytest.raises(snows.UsageError, match=message):
        snows.prune(tiny, images, snows.NM(1, 2), fast(), algo=snows_with(solver))


def test_ctrl_c_in_the_joint_steps_keeps_all_the_layers(tiny, images):
    def stops(objective, *problem):
        if len(objective.window.layers) > 1:
            raise KeyboardInterrupt
        return solve(objective, *problem)

    with pytest.raises(Interrupted, match="after 4 layers") as stopped:
        snows.prune(tiny, images, snows.NM(1, 2), fast(joint_steps=1), algo=snows_with(stops))
    alone = snows.prune(tiny, images, snows.NM(1, 2), fast())
    for ours, reference in zip(stopped.value.result.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, reference)
