import logging
import os
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks lose time to threads, a busy machine more

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "CNN_pruning")]

from resnet_cifar import ResNet  # noqa: E402


class TinyCNN(nn.Module):
    """Everything that goes wrong, small: a shared in-place ReLU, a residual sum, groups, BatchNorms, a smooth gate."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.gate = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        y = self.bn2(self.grouped(x))
        y += x
        y = self.relu(y)
        y = y * torch.sigmoid(self.gate(y))
        return self.fc(y.mean((2, 3)))


def randomise(model, seed=0):
    """Weights, statistics and affine parameters that are all away from their defaults, in float64, ready to prune."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


@pytest.fixture
def tiny():
    return randomise(TinyCNN())


@pytest.fixture
def images():
    return torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with an .npz of eight 8 x 8 colour images a part and an untrained ResNet-20's checkpoint."""
    folder = tmp_path_factory.mktemp("small")
    generator = np.random.default_rng(0)
    arrays = {f"x_{part}": generator.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": np.arange(8, dtype=np.uint8) for part in ("train", "test")}
    np.savez(folder / "images.npz", **arrays)
    torch.manual_seed(0)
    torch.save(ResNet(20, 10).state_dict(), folder / "resnet20.pt")
    return folder


@contextmanager
def same_signals():
    """What signals do to this process is as it was."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit "ignore"
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def signals(monkeypatch):
    """A test that runs `shell` in this process, and leaves its signals as they were."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with same_signals():
        yield


class Script:
    """Runs a script of either folder as the shell would, but in this process."""

    def __init__(self, monkeypatch, capsys):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def ended(self, path, *flags):
        """((stdout, stderr), exit code)"""
        log = logging.getLogger("snows")
        with self.monkeypatch.context() as patched, same_signals():
            patched.setattr(log, "handlers", log.handlers)  # which a script sets for its own process
            patched.setattr(log, "level", log.level)
            patched.setattr(sys, "unraisablehook", sys.unraisablehook)
            patched.setattr(sys, "argv", [str(ROOT / path), *map(str, flags)])
            patched.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
            for module in {path.stem for path in ROOT.glob("*_pruning/*.py")} & set(sys.modules):
                patched.delitem(sys.modules, module)  # both folders have a utils.py
            try:
                runpy.run_path(str(ROOT / path), run_name="__main__")
                code = 0
            except SystemExit as exit:
                code = exit.code
        return self.capsys.readouterr(), code

    def __call__(self, path, *flags, code=0):
        """(stdout, stderr) of a script that must end with `code`."""
        captured, ended = self.ended(path, *flags)
        assert ended == code, captured.err
        return captured


@pytest.fixture
def script(monkeypatch, capsys):
    return Script(monkeypatch, capsys)
