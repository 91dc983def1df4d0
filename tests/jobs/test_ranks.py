"""Several processes that share the images come to what one comes to, and end together."""

import pytest
import ranks
import torch
from ranks import CASES, in_processes

from snows import distributed
from snows.cli.launch import first_host, place
from snows.distributed import ALONE
from snows.errors import Unfinished, UsageError
from snows.verdicts import Ended


@pytest.fixture(scope="module")
def alone():
    """What one process makes of each case."""
    return ranks.each_case(CASES, torch.float64)


def off(ours, reference):
    """The largest relative error of a weight."""
    pairs = zip(ours.model.parameters(), reference.model.parameters(), strict=True)
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def same_weights(ours, other):
    return all(torch.equal(*pair) for pair in zip(ours.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("number", "names"),
    [
        (1, ["best"]),
        (2, ["best", "least squares", "SparseGPT"]),
        (3, ["best", "samples", "paper", "masks alone"]),
    ],
)
def test_the_result_is_that_of_one_process(number, names, alone):
    found = in_processes(number, ranks.each_case, names, torch.float64)
    for name in names:
        reference, results = alone[name], [each[name] for each in found]
        assert off(results[0], reference) < 1e-10, name
        assert all(same_weights(other, results[0]) for other in results[1:]), name
        assert all(results[0].masks[layer].equal(mask) for layer, mask in reference.masks.items()), name
        assert [r.cg_iterations for r in results[0].layers] == [r.cg_iterations for r in reference.layers], name
        assert [r.batch_size for r in results[0].layers] == [r.batch_size for r in reference.layers], name


def test_the_result_is_that_of_one_process_in_single_precision():
    first, _ = in_processes(2, ranks.each_case, ["best"], torch.float32)
    assert off(first["best"], ranks.prune("best", torch.float32)) < 1e-5


def test_memory_that_one_process_lacks_halves_the_micro_batches_of_all():
    first, second = in_processes(2, ranks.with_little_memory)
    sizes = [record.batch_size for record in first.layers]
    assert sizes == [record.batch_size for record in second.layers]
    assert max(sizes) == 2
    assert not first.problems
    assert same_weights(first, second)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all(rank):
    errors = in_processes(2, ranks.with_an_error_at, rank)
    what = "unexpected OSError after 2 layers: no space"
    assert errors[rank] == (Unfinished, what, 2)
    assert errors[1 - rank] == (Ended, f"process {rank}: {what}", 2)


GIVEN = {"weights": "weights", "statistics": "weights", "images": "calibration images"}
GIVEN |= {each: each for each in ("pattern", "layers", "masks")}


@pytest.mark.parametrize("what", GIVEN)
def test_processes_that_were_given_something_else_say_so(what):
    first, second = in_processes(2, ranks.given_other, what)
    assert second.text == f"process 1 was given other {GIVEN[what]} than process 0."
    assert first.text == f"process 1: {second.text}"


def test_fewer_images_than_processes_are_refused():
    for error in in_processes(2, ranks.with_too_few_images):
        assert error.kind is UsageError
        assert "1 calibration images cannot be shared by 2 processes" in error.text


@pytest.mark.parametrize(("rank", "number"), [(0, 3), (1, 2)])
def test_a_process_that_is_killed_ends_the_others_and_the_job_goes_on_in_fewer(rank, number, alone):
    found = in_processes(number, ranks.killed_at, rank, 3)
    assert found.pop(rank) is None
    for steps, lost in found:
        assert lost == "another process of the job has ended."
        assert len(steps) >= 3
    results = in_processes(number - 1, ranks.going_on, found[0][0])
    assert off(results[0], alone["best"]) < 1e-10
    assert all(same_weights(other, results[0]) for other in results[1:])


def test_every_image_is_one_process_s_however_the_set_is_cut():
    for size in (1, 2, 3, 8):
        shared = [distributed.Group() for _ in range(size)]
        for rank, group in enumerate(shared):
            group.rank, group.size = rank, size
        for cut in (1, 2, 5, 11):
            for rank, group in enumerate(shared):
                numbers = [range(a, min(a + cut, 11))[group.share(a, min(cut, 11 - a))] for a in range(0, 11, cut)]
                assert [i for part in numbers for i in part] == list(range(rank, 11, size))
    assert ALONE.share(5, 3) == slice(0, 3, 1)


def test_a_launch_is_known_by_its_environment():
    assert place({}) is None
    assert place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # a job's own script
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert place(torchrun) == torchrun
    step = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70001"}
    found = place({**step, "SLURM_STEP_NODELIST": "gpu[03-04,9],other"})
    assert found == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "30001"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("hosts", "first"), [("a", "a"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[03,07]", "n03"), ("x-1,x-2", "x-1")]
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first
