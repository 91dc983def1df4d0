"""Runs that were killed, stopped or ran out of disk go on, and end with the bits of a run that was not."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ROOT

from snows.checksum import checksum
from snows.cli import files, run_folder
from snows.cli.journal import Journal
from snows.errors import UsageError
from snows.result import LayerRecord, Step

SMALL = ["--k_step", "2", "--max_CG_iterations", "1", "--ngrads", "32", "--schedule", "1", "--sweeps", "1"]
SMALL += ["--joint_steps", "1", "--joint_CG_iterations", "1", "--skip", "layer[12].*", "--target_sparsity", "0.5"]
SWEEP = 9  # layers of the ResNet-20 that are left: conv1, those of layer3, and fc
LAYERS = SWEEP * 2  # in a sweep of the schedule and one at the target; then all of them together


def start(*flags, **settings):
    """The script in a process of its own."""
    command = [sys.executable, "-u", str(ROOT / "CNN_pruning" / "unstr.py"), *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True, **settings)


def end(process, code=0):
    """What a process says until it ends: (stdout, stderr)."""
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def after(process, layers):
    """Wait until so many more layers are finished."""
    for line in process.stdout:
        layers -= " zero " in line
        if layers <= 0:
            return


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    end(start(*SMALL, "--out_dir", folder))
    return folder


def same_bits(folder, other):
    """Whether two finished runs left the same weights and masks, to the byte, and nothing unfinished."""
    assert json.loads((folder / "metrics.json").read_text())["finished"]
    assert not (folder / "steps").exists()
    assert not list(folder.glob("*.tmp"))
    assert (folder / "report.html").exists()
    names = ("model.safetensors", "masks.safetensors")
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_killed_run_goes_on_to_the_same_bits(whole, script, tmp_path):
    """Killed in its first sweep, terminated in the second, and at last asked to go on once too often."""
    folder = tmp_path / "run"
    process = start(*SMALL, "--out_dir", folder)
    after(process, 3)
    process.kill()
    process.communicate()
    solved = len(Journal(folder))
    assert 3 <= solved < SWEEP

    process = start("--resume", folder)
    after(process, SWEEP + 3 - solved)
    process.terminate()
    out, err = end(process, code=143)
    assert len(err.strip().splitlines()) == 1
    assert json.loads((folder / "metrics.json").read_text())["finished"] is False

    command = re.search(rf"Go on: {sys.executable} (.*)", err)[1].split()
    out, _ = script(*command)
    assert out.count(" zero ") <= SWEEP - 3  # what was solved is not solved again
    assert same_bits(folder, whole)
    assert len(json.loads((folder / "layers.json").read_text())) == LAYERS + SWEEP
    assert json.loads((folder / "args.json").read_text())["schedule"] == 1
    out, _ = script(*command)
    assert "finished already" in out


def kill(process, moments):
    """Kill a run at a random moment, counted in its own lines so that a slow machine makes no difference."""
    for _ in range(moments.randrange(16)):
        process.stdout.readline()
    time.sleep(moments.uniform(0, 0.3))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_runs_survive_twenty_kills_at_random_moments(whole, tmp_path):
    """Every moment: while it loads, in a layer, in a write, at the end; after five kills a run may go on to its end."""
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"run{runs}"
        process = start(*SMALL, "--out_dir", folder)
        for _ in range(5):
            if kill(process, moments):
                kills += 1
            begun = (folder / "args.json").exists()
            resumed = ["--resume", folder] if begun else [*SMALL, "--out_dir", folder]
            process = start(*resumed)
        _, err = end(process)
        assert err == ""
        assert same_bits(folder, whole)
        runs += 1
    print(f"{kills} kills in {runs} runs")


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(whole, script, tmp_path):
    """A limit on the size of files stands for the full disk: the 64 x 64 convolutions do not fit."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        _, err = script("CNN_pruning/unstr.py", *SMALL, "--out_dir", folder, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(err.strip().splitlines()) == 1
    assert "cannot write" in err
    assert f"--resume {folder}" in err
    finished = len(Journal(folder))
    assert 0 < finished < SWEEP
    assert not list(folder.rglob("*.tmp"))
    out, _ = script("CNN_pruning/unstr.py", "--resume", folder)
    assert out.count(" zero ") == LAYERS - finished
    assert same_bits(folder, whole)


@pytest.mark.slow
def test_a_full_tmpfs_ends_in_one_line_and_the_run_goes_on_when_there_is_room(whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not possible here")
    try:
        _, err = end(start(*SMALL, "--out_dir", disk / "run"), code=1)
        assert len(err.strip().splitlines()) == 1
        assert "No space left on device" in err
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        end(start("--resume", disk / "run"))
        assert same_bits(disk / "run", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def stopped(script, tmp_path, monkeypatch, whole):
    """A copy of the folder of a run that was stopped after its fifth layer."""
    original, append, count = whole.parent / "stopped", Journal.append, []

    def stop(journal, step):
        append(journal, step)
        count.append(step)
        if len(count) == 5:
            raise KeyboardInterrupt

    if not original.exists():
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append", stop)
            _, err = script("CNN_pruning/unstr.py", *SMALL, "--skip_evaluation", "--out_dir", original, code=130)
        assert "interrupted after 5 layers" in err
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_other_settings_are_refused_with_what_was_and_what_is_asked(script, stopped):
    _, err = script("CNN_pruning/unstr.py", "--resume", stopped, "--k_step", 3, "--allocation", "uniform", code=2)
    assert "--k_step was 2, now 3; --allocation was global, now uniform" in err
    _, err = script("CNN_pruning/prune_NM.py", "--resume", stopped, code=2)
    assert "was begun by CNN_pruning/unstr.py" in err
    _, err = script("CNN_pruning/unstr.py", *SMALL, "--out_dir", stopped, code=2)
    assert "not empty" in err
    _, err = script("CNN_pruning/unstr.py", "--resume", stopped, "--out_dir", stopped.parent / "elsewhere", code=2)
    assert err == f"error: --resume goes on in {stopped}: leave --out_dir out.\n"
    with run_folder.locked(stopped):
        _, err = script("CNN_pruning/unstr.py", "--resume", stopped, code=2)
    assert "still going" in err
    same = ["--k_step", 2, "--out_dir", stopped]
    out, _ = script("CNN_pruning/unstr.py", "--resume", stopped, *same, "--verbose")
    assert out.count(" zero ") == LAYERS - 5


@pytest.mark.parametrize("name", ["args.json", "metrics.json", "environment.json", "steps/0002.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_damaged_run_folder_ends_in_one_line(script, stopped, name, damage):
    path = stopped / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.write_text("{}")
    before = {file: file.read_bytes() for file in stopped.rglob("*.*")}
    _, err = script("CNN_pruning/unstr.py", "--resume", stopped, code=2)
    assert len(err.strip().splitlines()) == 1
    assert path.name in err
    assert {file: file.read_bytes() for file in stopped.rglob("*.*")} == before


def test_files_of_masks_and_of_rules_are_not_to_change(script, tmp_path, monkeypatch):
    """A run stopped after its second layer, whose file then says something else."""
    masks, rules, append = tmp_path / "masks.safetensors", tmp_path / "rules.json", Journal.append
    flags = [*SMALL, "--skip_evaluation"]

    def stop(journal, step):
        append(journal, step)
        if len(journal) == 2:
            raise KeyboardInterrupt

    more = {"conv1": torch.arange(144).view(16, 1, 3, 3) % 2, "fc": torch.arange(640).view(10, 64) % 2}
    safetensors.torch.save_file(more, masks)
    rules.write_text('{"fc": 0.5}')
    of_masks = [flag for flag in flags if flag not in ("--target_sparsity", "0.5")]  # which say how much is pruned
    for name, file, change in (("masks", masks, None), ("layer_sparsity", rules, '{"fc": 0.6}')):
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append", stop)
            given = of_masks if name == "masks" else flags
            script("CNN_pruning/unstr.py", *given, f"--{name}", file, "--out_dir", tmp_path / name, code=130)
        before = file.read_bytes()
        if change is None:
            safetensors.torch.save_file({**more, "fc": 1 - more["fc"]}, file)
        else:
            file.write_text(change)
        _, err = script("CNN_pruning/unstr.py", "--resume", tmp_path / name, code=2)
        assert ("its masks are not what they were" if name == "masks" else "was {'fc': 0.5}, now {'fc': 0.6}") in err
        file.write_bytes(before)
        script("CNN_pruning/unstr.py", "--resume", tmp_path / name, "--export_masks", tmp_path / "now.safetensors")
        (tmp_path / "now.safetensors").unlink()
        script("CNN_pruning/unstr.py", "--resume", tmp_path / name, "--export_masks", tmp_path / "now.safetensors")
        kept = (tmp_path / name / "masks.safetensors").read_bytes()
        assert (tmp_path / "now.safetensors").read_bytes() == kept
    assert json.loads((tmp_path / "layer_sparsity" / "args.json").read_text())["layer_sparsity"] == {"fc": 0.5}


def test_a_run_of_other_weights_or_images_does_not_go_on(script, stopped):
    path = stopped / "metrics.json"
    for what in ("weights", "masks", "calibration"):
        metrics = json.loads(path.read_text())
        files.write_json(path, {**metrics, f"{what}_checksum": "ffffffff"})
        _, err = script("CNN_pruning/unstr.py", "--resume", stopped, code=2)
        assert f"its {what} are not what they were" in err
        files.write_json(path, metrics)


def test_a_step_comes_back_as_it_was(tmp_path):
    record = LayerRecord(
        name="a.b",
        sweep=1,
        shape=(2, 3),
        sparsity=0.5,
        loss_before=2.0,
        loss_after=1.0,
        newton_steps=1,
        cg_iterations=2,
        products=2.0,
        seconds=0.1,
        peak_memory_bytes=1000,
        batch_size=64,
        residuals=[[0.5, 0.25]],
        accuracy=91.2,
    )
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(2, 3, generator=generator), torch.rand(2, 3, generator=generator) < 0.5
    journal = Journal(tmp_path)
    for shift in (None, torch.randn(2, generator=generator).double()):
        journal.append(Step(record, mask, weight, shift))
    assert len(journal) == 2
    for step, shift in zip(journal, (None, torch.randn(0))):
        assert step.record == record
        assert torch.equal(step.weight, weight)
        assert torch.equal(step.mask, mask)
        assert (step.bias_update is None) == (shift is None)
    journal.clear()
    assert len(journal) == 0


STEP = Step(
    LayerRecord(name="a", sweep=1, shape=(2, 2), sparsity=0.5, loss_before=2.0, loss_after=1.0),
    torch.tensor([[True, False], [False, True]]),
    torch.arange(4.0, dtype=torch.float64).view(2, 2),
    torch.ones(2),
)


def spoil(tmp_path, contents):
    """Each content in place of a step's file: the step is refused in the one line, or comes back as it was."""
    journal = Journal(tmp_path)
    journal.append(STEP)
    (path,) = journal.folder.iterdir()
    for content in contents(path.read_bytes()):
        path.write_bytes(content)
        try:
            (step,) = journal
        except UsageError as error:
            refusal = re.fullmatch(r".*0000.safetensors is damaged \([^\n]*\): delete it[^\n]*", str(error))
            if not refusal:
                raise
        else:
            assert step.record == STEP.record
            for name in ("mask", "weight", "shift"):
                ours, theirs = getattr(step, name), getattr(STEP, name)
                assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())


def flipped(content):
    """One bit of each byte, each of the eight in turn."""
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        yield changed


@pytest.mark.parametrize("damage", [flipped, lambda content: (content[:end] for end in range(len(content)))])
def test_no_flipped_bit_and_no_cut_of_a_step_goes_unnoticed(tmp_path, damage):
    """The record too: its losses, its counts and its name, and the header that says what the tensors are."""
    spoil(tmp_path, damage)


def test_a_step_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append(STEP)
    for error in (PermissionError(13, "Permission denied"), MemoryError(), RuntimeError("can't allocate memory")):

        def fails(_, error=error):
            raise error

        monkeypatch.setattr(safetensors.torch, "load", fails)
        with pytest.raises(type(error)):
            list(journal)


TENSORS = {
    "no dimension": torch.tensor(3.0),
    "one number between others": torch.arange(12.0).view(3, 4)[::2, 1:2][:1],
    "a last column of one row": torch.ones(1, 3, dtype=torch.float64)[:, 2],
    "no numbers": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "booleans": torch.tensor([True, False, True]),
    "bfloat16": torch.arange(6.0).bfloat16().view(2, 3),
    "every other": torch.arange(6.0)[::2],
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_checksum_is_of_the_numbers_whatever_the_shape_the_strides_and_the_type(tmp_path, kind):
    tensor = TENSORS[kind]
    assert checksum([tensor]) == checksum([tensor.clone(memory_format=torch.contiguous_format)])
    if tensor.numel():
        assert checksum([tensor]) != checksum([~tensor if tensor.dtype is torch.bool else tensor + 1])
    Journal(tmp_path).append(Step(STEP.record, STEP.mask, tensor))
    (step,) = Journal(tmp_path)
    assert step.weight.equal(tensor)


def test_a_run_killed_between_its_last_write_and_its_report_is_concluded(script, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "clear", lambda journal: sys.exit(9))
        script("CNN_pruning/unstr.py", *SMALL, "--skip_evaluation", "--sweeps", 1, "--out_dir", folder, code=9)
    assert (folder / "steps").exists()
    script("CNN_pruning/unstr.py", "--resume", folder)
    assert not (folder / "steps").exists()
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
