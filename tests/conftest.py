import logging
import os
import runpy
import signal
import sys
from contextlib import contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks lose time to threads, a busy machine more

import numpy as np
import pytest
import torch
from helpers import ROOT, TinyCNN, randomise
from resnet_cifar import ResNet


@pytest.fixture(autouse=True)
def same_log():
    """Whatever a test runs of the shell, the log is as it was for the next."""
    log = logging.getLogger("snows")
    handlers, level = log.handlers, log.level
    yield
    log.handlers = handlers
    log.setLevel(level)


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
