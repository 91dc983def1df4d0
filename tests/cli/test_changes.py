"""Runs that were ended before they began, and runs that go on with other flags than they began with."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from snows.cli import files, resume, run_folder
from snows.cli.journal import Journal
from snows.errors import SnowsError, UsageError
from snows.methods import METHODS

UNSTR = "CNN_pruning/unstr.py"
SMALL = ["--k_step", "0", "--max_CG_iterations", "1", "--ngrads", "8", "--schedule", "0", "--preconditioner", "none"]
SMALL += ["--joint_steps", "1", "--joint_CG_iterations", "1", "--skip_evaluation", "--batch_size", "4"]
LAYERS = 22  # of the ResNet-20


class Killed(BaseException):
    """What nothing catches: the process is gone."""


def json_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def ended_after(monkeypatch, script):
    """Runs a command that is ended as its journal holds so many steps."""

    def run(steps, *flags):
        append = Journal.append

        def stop(journal, step):
            append(journal, step)
            if len(journal) == steps:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append", stop)
            return script(UNSTR, *flags, code=130)

    return run


WRITTEN = ["environment.json", "calibration.json", "metrics.json", "args.json"]  # before the first layer


@pytest.mark.parametrize("moment", [*WRITTEN, *(f"{name}.tmp" for name in WRITTEN)])
def test_a_run_ended_before_it_had_begun_begins_again_with_the_same_command(script, tmp_path, monkeypatch, moment):
    """Killed before it writes each of its first files, and in the middle of each."""
    folder, flags, write = tmp_path / "run", ["--algo", "MP", "--skip_evaluation", "--out_dir"], files.write

    def killed(path, content):
        if path.name == moment.removesuffix(".tmp"):
            if moment.endswith(".tmp"):
                path.with_name(moment).write_text(content[:40])
            raise Killed
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", killed)
        with pytest.raises(Killed):
            script(UNSTR, *flags, folder)
    assert not (folder / "args.json").exists()
    _, err = script(UNSTR, "--resume", folder, code=2)
    assert "ended before its run had begun: give its first command again" in err
    script(UNSTR, *flags, folder)
    assert json_of(folder, "metrics")["finished"]
    assert not list(folder.glob("*.tmp"))


METRICS = {"dense_accuracy": 9.0, "finished": False}
OTHERS = {
    "a file of the user's": {"notes.txt": "precious"},
    "one of a run's names": {"metrics.json": "precious"},
    "something else under one": {"calibration.json": '{"camera": 1}'},
    "finished metrics": {"metrics.json": json.dumps({**METRICS, "finished": True})},
    "a begun run and more": {"metrics.json": json.dumps(METRICS), "model.safetensors": ""},
    "a run": {"metrics.json": json.dumps(METRICS), "args.json": "{}"},
    "another's unfinished file": {"thesis.tex.tmp": "precious"},
    "steps": {"steps/0000.safetensors": ""},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_folder_that_holds_anything_else_is_never_taken_over(tmp_path, kind):
    files.write_json(tmp_path / "environment.json", {"torch": "2"})
    for name, text in OTHERS[kind].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for refuse in (run_folder.check_free, run_folder.clear_begun, lambda path: run_folder.new_folder(path, "")):
        with pytest.raises(UsageError, match="not empty"):
            refuse(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_folder_that_another_run_filled_meanwhile_is_not_written_to(script, tmp_path, monkeypatch):
    """The other's run begins and ends between the look at the folder and the lock."""
    folder, locked = tmp_path / "run", run_folder.locked

    def late(path):
        (path / "model.safetensors").write_text("precious")
        return locked(path)

    monkeypatch.setattr(run_folder, "locked", late)
    _, err = script(UNSTR, "--algo", "MP", "--skip_evaluation", "--out_dir", folder, code=2)
    assert "not empty" in err
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def create(queue):
    run_folder.time.strftime = lambda form: "now"
    queue.put(str(run_folder.new_folder(None, "run")))


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=create, args=(queue,)) for _ in range(5)]
    for process in processes:
        process.start()
    names = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert names == ["runs/run-now", *(f"runs/run-now_{number}" for number in range(2, 6))]


def test_a_default_folder_that_cannot_be_created_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")
    with pytest.raises(SnowsError, match="cannot create runs/run"):
        run_folder.new_folder(None, "run")


def test_a_run_goes_on_with_other_micro_batches_and_keeps_to_them(script, ended_after, tmp_path):
    """Begun with 4 images, then 2, then 2 again without a word, then 8: each layer is solved with those of its time."""
    folder = tmp_path / "run"
    ended_after(3, *SMALL, "--out_dir", folder)
    _, err = ended_after(6, "--resume", folder, "--batch_size", 2, "--num_workers", 1, "--test_batch_size", 9)
    assert err.splitlines()[0] == f"note: --batch_size was 4, now 2: {resume.OTHERS}."
    saved = json_of(folder, "args")
    assert (saved["batch_size"], saved["num_workers"], saved["test_batch_size"]) == (2, 1, 9)
    assert saved["argv"][: len(SMALL)] == SMALL
    assert json_of(folder, "metrics")["options"]["batch_size"] == 2

    _, err = ended_after(9, "--resume", folder, "--num_workers", 0)
    assert not err.startswith("note")  # nothing that bears on the result
    assert json_of(folder, "args")["batch_size"] == 2
    _, err = script(UNSTR, "--resume", folder, "--batch_size", 8, "--memory_budget", 1.5)
    assert "--batch_size was 2, now 8; --memory_budget was 0.0, now 1.5: what is still" in err
    assert [layer["batch_size"] for layer in json_of(folder, "layers")] == [4] * 3 + [2] * 6 + [8] * (
        LAYERS - 9 + LAYERS
    )
    metrics, saved = json_of(folder, "metrics"), json_of(folder, "args")
    assert (metrics["options"]["batch_size"], metrics["options"]["memory_budget"]) == (8, 1.5)
    assert metrics["finished"]
    assert [sorted(resume) for resume in saved["resumes"]] == [
        ["after", "batch_size", "num_workers", "test_batch_size"],
        ["after", "num_workers"],
        ["after", "batch_size", "memory_budget"],
    ]
    assert [resume["after"] for resume in saved["resumes"]] == [3, 6, 9]


def test_micro_batches_that_ran_out_of_memory_are_cut_again_only_where_nothing_has_changed(tmp_path):
    """What `earlier` tells of each step is what the pipeline goes by."""
    from snows.cli.resume import earlier
    from snows.result import LayerRecord, Step

    steps = [Step(LayerRecord(name=str(i), sweep=0, shape=(1,), sparsity=0.5), None, None) for i in range(4)]
    for resumes, fitted in (
        ([], [True] * 4),
        ([{"after": 2, "num_workers": 4}, {"after": 3, "joint_steps": 0}], [True] * 4),
        ([{"after": 1, "device": "cpu"}, {"after": 3, "batch_size": 2}], [False, False, False, True]),
    ):
        assert [step.fitted for step in earlier(resumes, steps)] == fitted


def test_a_run_whose_joint_steps_fail_is_ended_without_them(script, tmp_path, monkeypatch):
    def fails(*_):
        raise SnowsError("out of memory at the joint steps")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setitem(METHODS, "SNOWS", replace(METHODS["SNOWS"], update_jointly=fails))
        script(UNSTR, *SMALL, "--out_dir", folder, code=1)
    assert len(Journal(folder)) == LAYERS
    out, err = script(UNSTR, "--resume", folder, "--joint_steps", 0)
    assert err.splitlines() == ["note: --joint_steps was 1, now 0: those steps are left out."]
    assert " zero " not in out
    assert len(json_of(folder, "layers")) == LAYERS
    assert json_of(folder, "metrics")["options"]["joint_steps"] == json_of(folder, "args")["joint_steps"] == 0


@pytest.mark.parametrize(
    ("began", "flags", "refused"),
    [
        (["--batching", "True"], ["--batch_size", 64], "--batch_size was 128, now 64"),
        (["--mixtures", "1"], ["--batch_size", 64], "--batch_size was 128, now 64"),
        ([], ["--joint_steps", 2], "--joint_steps was 4, now 2"),
        (["--joint_stages", "True"], ["--joint_steps", 0], "--joint_steps was 4, now 0"),
        (["--joint_steps", "0"], ["--joint_steps", 2], "--joint_steps was 0, now 2"),
        ([], ["--joint_images", 2], "--joint_images was 0, now 2"),
        ([], ["--joint_CG_iterations", 2, "--batch_size", 4], "settings: --joint_CG_iterations was 10, now 2. Leave"),
    ],
)
def test_what_would_change_the_problem_is_refused(script, tmp_path, began, flags, refused):
    saved = {"script": UNSTR, "argv": began, "algo": "SNOWS", "seed": 0}
    files.write_json(tmp_path / "args.json", saved)
    before = (tmp_path / "args.json").read_bytes()
    _, err = script(UNSTR, "--resume", tmp_path, *flags, code=2)
    assert refused in err
    assert (tmp_path / "args.json").read_bytes() == before


def test_a_run_goes_on_where_its_device_is_only_if_it_is_told_to(script, ended_after, tmp_path):
    """Begun on a GPU that is not here: `args.json` says so, whatever the default is on this machine."""
    folder = tmp_path / "run"
    ended_after(2, *SMALL, "--out_dir", folder)
    files.write_json(folder / "args.json", {**json_of(folder, "args"), "device": "cuda:99"})
    _, err = script(UNSTR, "--resume", folder, code=2)
    assert "cannot use device cuda:99" in err
    _, err = script(UNSTR, "--resume", folder, "--device", "cpu")
    assert f"note: --device was cuda:99, now cpu: {resume.OTHERS}." in err
    assert json_of(folder, "args")["device"] == "cpu"
