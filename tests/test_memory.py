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
