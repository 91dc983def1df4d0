"""Memory figures follow what is really in use; those of a process in one of its own, whose allocator is untouched."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT

import snows
from snows import memory
from snows.errors import SnowsError
from snows.memory import free_memory


def printed(program):
    """The numbers that a Python program prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_figures_follow_what_is_in_use():
    """The peak is seen and forgotten; memory that is kept once freed does not count, and is mapped once."""
    before, high, after, faults, used, with_block, without = printed("""
import resource, torch
from snows.memory import forget_peak, keep_freed_memory, peak_memory, used_memory
forget_peak("cpu")
print(peak_memory("cpu"))
block = torch.ones(2**26)
print(peak_memory("cpu"))
del block
forget_peak("cpu")
print(peak_memory("cpu"))
keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
mapped = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - mapped)
print(used_memory("cpu"))
block = torch.ones(2**26)
print(used_memory("cpu"))
del block
print(used_memory("cpu"))
""")
    assert high - before > 0.9 * 2**28
    assert high - after > 0.9 * 2**28
    assert faults < 2**24 * 4 / 4096  # fewer than one block's pages, for ten blocks
    assert with_block - used > 0.9 * 2**28
    assert with_block - without > 0.9 * 2**28
    assert 0 < free_memory("cpu") < 2**50


def test_free_memory_is_what_the_containers_leave(tmp_path):
    """Control groups of both versions, nested, their file cache counted as free; without a limit, none."""

    def group(path, **files):
        path.mkdir(parents=True)
        for name, text in files.items():
            (path / name.replace("_0_", ".")).write_text(text)

    stat = "cache 5\ninactive_file 30\n"
    group(tmp_path / "v2/outer/inner", memory_0_max="max", memory_0_current="70", memory_0_stat=stat)
    (tmp_path / "v2/outer/memory.max").write_text("100")
    (tmp_path / "v2/outer/memory.current").write_text("90")
    (tmp_path / "v2/outer/memory.stat").write_text(stat)
    v1 = {"memory_0_limit_in_bytes": "500", "memory_0_usage_in_bytes": "400", "memory_0_stat": "total_inactive_file 50"}
    group(tmp_path / "v1/memory", **v1)
    (tmp_path / "two").write_text("0::/outer/inner\n")
    (tmp_path / "one").write_text("5:cpu,memory:/not/mounted/here\n4:cpuset:/\n")
    assert list(memory._containers(tmp_path / "v2", tmp_path / "two")) == [(100, 60)]
    assert list(memory._containers(tmp_path / "v1", tmp_path / "one")) == [(500, 350)]
    assert list(memory._containers(tmp_path / "v2", tmp_path / "none")) == []


def test_free_memory_is_what_a_container_leaves(monkeypatch):
    monkeypatch.setattr(memory, "_containers", lambda: [(2**30, 2**29), (2**30, 2**30 - 4096)])
    assert free_memory("cpu") == 4096
    monkeypatch.setattr(memory, "_containers", lambda: [(2**30, 2**31)])
    assert free_memory("cpu") == 0


def test_free_memory_is_what_ulimit_leaves():
    for free in printed("""
import resource, torch
from snows.memory import free_memory
for limit, size in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (2**36, hard))
    free_memory("cpu")  # whatever that takes the first time
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    resource.setrlimit(limit, (1024 * int(status[size].split()[0]) + 2**28, hard))
    print(free_memory("cpu"))
    resource.setrlimit(limit, (hard, hard))
"""):
        assert 2**27 < free <= 2**28


BUDGET = """
import torch
from torch import nn
import snows
from snows import memory
from snows.errors import SnowsError

torch.manual_seed(0)
layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
model = nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8 * 16, 4))
images = torch.randn(64, 8, 32, 32)

def run(mebibytes, batch_size):
    memory.forget_peak("cpu")
    before, in_use = memory.peak_memory("cpu"), memory.used_memory("cpu")
    budget = (in_use / 2**20 + mebibytes) / 1024 if mebibytes else 0
    options = snows.Options(schedule=0, joint_steps=1, joint_CG_iterations=1, max_CG_iterations=1)
    pruned = snows.prune(model, images, snows.NM(1, 2), options.but(batch_size=batch_size, memory_budget=budget))
    return pruned, max(layer.peak_memory_bytes for layer in pruned.layers) - before

free, most = run(0, BATCH)
bound, peak = run(16, BATCH)
weights = list(zip(free.model.parameters(), bound.model.parameters()))
"""


def test_a_memory_budget_bounds_the_whole_job_and_changes_no_bit():
    """What 64 images take here is some 70 MiB: features, targets and the graphs of products."""
    most, peak, same = printed(
        BUDGET.replace("BATCH", "2") + "print(most, peak, int(all(a.equal(b) for a, b in weights)))"
    )
    assert most > 2 * 2**24
    assert peak < 1.1 * 2**24
    assert same


def test_micro_batches_are_cut_to_the_budget_for_the_layers_that_need_it_alone():
    first, last, joint, whole, difference = printed(
        BUDGET.replace("BATCH", "64")
        + """
sizes = [layer.batch_size for layer in bound.layers]
print(sizes[0], sizes[4], sizes[5], free.layers[0].batch_size)
print(int(1e3 * max((a - b).abs().max() for a, b in weights)))  # their random probes are others
"""
    )
    assert first < last
    assert joint < last <= whole == 64
    assert difference < 10


def test_a_budget_for_not_even_one_image_is_refused_before_anything_is_computed():
    model, images = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten()), torch.randn(4, 8, 16, 16)
    message = r"before anything was computed: layer 0 needs about .* for one image .* raise `memory_budget`, lower"
    with pytest.raises(SnowsError, match=message):
        snows.prune(model, images, snows.NM(1, 2), snows.Options(memory_budget=1e-6, joint_steps=0), listener=None)
