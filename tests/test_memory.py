"""Memory figures follow what is really in use."""

import torch

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
