"""Signals, memory and limits: whatever stops a script, it ends in one line, and what is finished is kept."""

import copy
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from helpers import ROOT
from torch import nn

from snows.cli import run_folder
from snows.cli.journal import Journal
from snows.cli.one_run import save_stopped
from snows.cli.shell import shell
from snows.errors import SnowsError, WriteError
from snows.result import Pruned
from snows.zoo.evaluate import accuracy
from snows.zoo.images import Data

SMALL = ["--k_step", "0", "--max_CG_iterations", "1", "--ngrads", "8", "--schedule", "0", "--joint_steps", "0"]
SMALL += ["--skip_evaluation"]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def signalled_at_import(tmp_path, library, number, *command):
    """(exit code, stderr) of a command for which a library that raises the signal stands in front of the real one."""
    (tmp_path / f"{library}.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(9)\n")
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit "ignore"
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("folder", ["CNN_pruning", "VIT_pruning"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_torch_is_imported_ends_in_one_line(tmp_path, folder, number):
    ended = signalled_at_import(tmp_path, "torch", number, f"{folder}/unstr.py")
    assert ended == (SIGNALS[number], "error: interrupted\n")


REPORTS = ["snows.report", "snows.cli.report"]


@pytest.mark.parametrize(("library", "name"), [*(("torch", name) for name in REPORTS), ("matplotlib", REPORTS[1])])
def test_a_signal_while_a_report_imports_its_libraries_ends_in_one_line(tmp_path, library, name):
    ended = signalled_at_import(tmp_path, library, signal.SIGINT, "-m", name, "nowhere")
    assert ended == (130, "error: interrupted\n")


@pytest.mark.usefixtures("signals")
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_no_run_ends_in_one_line(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["report", "nowhere"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(name, run_name="__main__")
    err = capsys.readouterr().err
    assert (exit.value.code, err.count("\n"), err[:22]) == (2, 1, "error: nowhere holds n")


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_while_a_stopped_run_is_saved_change_nothing(script, tmp_path, monkeypatch, number):
    """One after the second layer, and three more of either kind as it is saved."""
    folder, append, save = tmp_path / "run", Journal.append, run_folder.save

    def stop_after_the_second(journal, step):
        append(journal, step)
        if len(journal) == 2:
            os.kill(os.getpid(), number)

    def stop_again(*args):
        for again in (number, *SIGNALS):
            os.kill(os.getpid(), again)
        return save(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", stop_after_the_second)
        patched.setattr(run_folder, "save", stop_again)
        _, err = script("CNN_pruning/unstr.py", *SMALL, "--out_dir", folder, code=SIGNALS[number])
    assert len(err.strip().splitlines()) == 1
    assert "interrupted after 2 layers. The finished layers are saved in" in err
    assert f"--resume {folder}" in err
    assert not list(folder.rglob("*.tmp"))
    assert (folder / "report.html").exists()
    out, _ = script("CNN_pruning/unstr.py", "--resume", folder)
    assert out.count(" zero ") == 20


def ended(capsys, main):
    """(exit code, stderr) of a script with this main."""
    with pytest.raises(SystemExit) as exit:
        shell(main)
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    return exit.value.code, err


def signalled(number, error):
    """A main in which a library turns a signal into an error of its own."""

    def main():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise error from None

    return main


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "error",
    [
        TypeError("could not determine the shape of object type 'torch.storage.UntypedStorage'"),
        SnowsError("the images do not run through the model: nonsense"),
        RuntimeError("out of memory"),
    ],
)
def test_a_signal_that_a_library_hides_behind_an_error_is_told_as_a_signal(capsys, number, error):
    assert ended(capsys, signalled(number, error)) == (SIGNALS[number], "error: interrupted\n")


@pytest.mark.usefixtures("signals")
def test_a_signal_that_a_destructor_swallows_is_given_once_more(capsys):
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def main():
        Swallows()
        time.sleep(5)

    assert ended(capsys, main) == (143, "error: interrupted\n")


@pytest.mark.usefixtures("signals")
def test_a_process_that_loads_images_leaves_at_a_signal_without_a_word(capsys):
    def main():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(9)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 143

    shell(main)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [WriteError("cannot write x: No space left."), RuntimeError("out of memory")])
def test_a_stopped_run_that_cannot_be_saved_says_so_and_stays_stopped(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(run_folder, "save", fails)
    said = save_stopped(tmp_path, Pruned(nn.Linear(1, 1), {}), {})
    assert str(error).rstrip(".") in said
    assert "kept" in said


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_anywhere_is_told_as_that(capsys, error):
    def main():
        raise error

    code, err = ended(capsys, main)
    assert code == 1
    assert err.startswith("error: out of memory: ")
    assert "--test_batch_size" in err


@pytest.mark.parametrize("place", ["registry.outputs_for", "classifier.load_checkpoint", "arguments.check_model"])
def test_out_of_memory_is_not_told_as_another_fault(script, tmp_path, monkeypatch, place):
    """Where whatever a network or a file raises is told as that they are wrong."""

    def fails(*_, **__):
        raise RuntimeError("could not create a primitive")

    inside = {
        "registry.outputs_for": (nn.Conv2d, "forward"),
        "classifier.load_checkpoint": (safetensors.torch, "load_file"),
    }
    monkeypatch.setattr(*inside.get(place, (copy, "deepcopy")), fails)
    _, err = script("CNN_pruning/unstr.py", *SMALL, "--out_dir", tmp_path / "run", code=1)
    assert err.startswith("error: out of memory: ")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [OUT_OF_MEMORY[1], OUT_OF_MEMORY[2]], ids=repr)
def test_out_of_memory_in_a_run_says_how_to_go_on(script, tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("snows.cli.task.prune", lambda *_, algo, **__: MASKED if algo == "MP" else fails())
        MASKED = Pruned(nn.Linear(1, 1), {})
        _, err = script("CNN_pruning/unstr.py", *SMALL, "--out_dir", tmp_path / "run", code=1)
    assert len(err.strip().splitlines()) == 1
    assert "error: out of memory: " in err
    assert f"--resume {tmp_path / 'run'} --batch_size N" in err


class Hungry(nn.Module):
    """Classifies by the first two pixels; more than `most` images at a time are too many for the memory."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.seen = most, error, []

    def forward(self, images):
        self.seen.append(len(images))
        if len(images) > self.most:
            raise self.error
        return images.flatten(1)[:, :2]


@pytest.fixture
def batches():
    """Thirteen images in batches of seven; the first ten are classified rightly."""
    images = torch.randn(13, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = images.flatten(1)[:, :2].argmax(1)
    labels[10:] = 1 - labels[10:]
    return list(zip(images.split(7), labels.split(7)))


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:4], ids=repr)
@pytest.mark.parametrize("most", [1, 2, 3, 6, 7])
def test_an_evaluation_that_runs_out_of_memory_goes_on_with_fewer_images(batches, most, error):
    model = Hungry(most, error)
    assert accuracy(model, batches) == 100 * 10 / 13
    fitted = [count for count in model.seen if count <= most]
    assert sum(fitted) == 13
    assert all(count <= fitted[0] for count in fitted)  # what did not fit is not tried again


def test_an_evaluation_that_cannot_hold_one_image_names_the_option(batches):
    with pytest.raises(SnowsError, match=r"^out of memory with one test image[^\n]*`test_batch_size`[^\n]*$"):
        accuracy(Hungry(0, OUT_OF_MEMORY[1]), batches)
    with pytest.raises(RuntimeError, match="of another kind"):
        accuracy(Hungry(0, RuntimeError("of another kind")), batches)


def test_an_evaluation_on_a_cpu_passes_sixteen_mebibytes_of_images_at_a_time():
    images = torch.zeros(1, 1, 1024, 1024).expand(9, 1, 1024, 1024)  # four mebibytes each
    model = Hungry(9, None)
    assert accuracy(model, [(images, torch.zeros(9, dtype=torch.int64))]) == 100
    assert model.seen == [4, 4, 1]


class Images(torch.utils.data.Dataset):
    """What processes load: seven images, or an error of their own."""

    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if self.error:
            raise self.error
        return torch.full((1, 2, 2), float(index)), index


def test_too_few_open_files_for_the_loading_processes_end_in_one_line(capfd):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = Data(Images(), Images(), num_workers=4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, before[1]))
    try:
        with pytest.raises(SnowsError, match=r"^the 4 processes that load images fail: [^\n]*`num_workers`[^\n]*$"):
            list(data.test_batches(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_an_image_raises_in_a_loading_process_is_passed_on(recwarn):
    data = Data(Images(), Images(ValueError("a broken image")), num_workers=3)
    images, indices = data.calibration(5, 0)
    assert images[:, 0, 0, 0].tolist() == indices
    with pytest.raises(ValueError, match="a broken image"):
        list(data.test_batches(2))
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]


def test_output_that_cannot_be_written_ends_in_one_line(script, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, suppress(OSError):  # which closing it raises once more
        monkeypatch.setattr(sys, "stdout", full)
        flags = [*SMALL, "--algo", "MP", "--out_dir", tmp_path / "run"]
        assert script("CNN_pruning/unstr.py", *flags, code=1).err == "error: [Errno 28] No space left on device\n"
