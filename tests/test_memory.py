"""Memory figures follow what is really in use."""

import subprocess
import sys

import torch
from conftest import ROOT

from snows.memory import forget_peak, free_memory, peak_memory


def test_the_peak_is_seen_and_forgotten():
    forget_peak("cpu")
    before = peak_memory("cpu")
    block = torch.ones(2**26)  # 256 MiB
    high = peak_memory("cpu")
    assert high - before > 0.9 * block.nbytes
    del block
    forget_peak("cpu")
    assert peak_memory("cpu") < high - 2**27
    assert 0 < free_memory("cpu") < 2**50


def test_freed_memory_is_kept_for_the_next_tensor():
    """The pages of a large block are mapped once, not at every allocation (in a process of its own)."""
    program = """
import resource, torch
from snows.memory import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24 * 4 / 4096  # fewer than one block's pages, for ten blocks
