"""Memory figures follow what is really in use; each test in a process of its own, whose allocator is untouched."""

import subprocess
import sys

from conftest import ROOT

from snows.memory import free_memory


def printed(program):
    """The numbers that a Python program prints."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_the_peak_is_seen_and_forgotten():
    before, high, after = printed("""
import torch
from snows.memory import forget_peak, peak_memory
forget_peak("cpu")
print(peak_memory("cpu"))
block = torch.ones(2**26)
print(peak_memory("cpu"))
del block
forget_peak("cpu")
print(peak_memory("cpu"))
""")
    assert high - before > 0.9 * 2**28
    assert high - after > 0.9 * 2**28
    assert 0 < free_memory("cpu") < 2**50


def test_freed_memory_is_kept_for_the_next_tensor():
    """The pages of a large block are mapped once, not at every allocation."""
    (faults,) = printed("""
import resource, torch
from snows.memory import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""")
    assert faults < 2**24 * 4 / 4096  # fewer than one block's pages, for ten blocks


def test_what_is_in_use_counts_and_what_is_kept_for_later_does_not():
    before, high, after = printed("""
import torch
from snows.memory import keep_freed_memory, used_memory
keep_freed_memory()
print(used_memory("cpu"))
block = torch.ones(2**26)
print(used_memory("cpu"))
del block
print(used_memory("cpu"))
""")
    assert high - before > 0.9 * 2**28
    assert high - after > 0.9 * 2**28


def test_a_memory_budget_halves_micro_batches_and_bounds_what_products_keep():
    """A product's graph of 32 images needs about 8 MiB here; 4 MiB are allowed."""
    whole, small, kept, difference = printed("""
import torch
from torch import nn
import snows
from snows import memory, objective

torch.manual_seed(0)
layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
model = nn.Sequential(*layers, nn.Flatten()).double()
images, most, init = torch.randn(32, 8, 16, 16).double(), 0, objective.Linearisation.__init__

def watched(self, *args):
    global most
    before = memory.used_memory("cpu")
    init(self, *args)
    most = max(most, memory.used_memory("cpu") - before)

objective.Linearisation.__init__ = watched
def run(budget):
    options = snows.Options(batch_size=32, memory_budget=budget, schedule=0, joint_steps=1, preconditioner="none")
    return snows.prune(model, images, snows.NM(1, 2), options)

free = run(0.0)
most = 0
bound = run(4 / 1024)
print(free.layers[-1].batch_size, bound.layers[-1].batch_size, most)
print(int(1e6 * max((a - b).abs().max() for a, b in zip(free.model.parameters(), bound.model.parameters()))))
""")
    assert whole == 32
    assert small < 32
    assert kept < 4 * 2**20 + 2**18  # the gradient and the loss besides
    assert difference < 10
