"""--export and python -m snows.export on tiny runs: what they leave and say, and bad input that ends in one line."""

import json
import shutil
import signal
import sys

import pytest
import safetensors.torch
import torch
from resnet_cifar import ResNet

import snows
from snows.cli.exporting import main
from snows.cli.shell import shell
from snows.deploy import packages


@pytest.fixture
def flags(small):
    network = ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz"]
    return [*network, "--algo", "MP"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the finished run lies that the tests copy, once there is one."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(script, flags, kept, tmp_path):
    """The folder of a finished run."""
    if not kept.exists():
        script("CNN_pruning/prune_NM.py", *flags, "--out_dir", kept)
    return shutil.copytree(kept, tmp_path / "run")


@pytest.fixture
def ended(monkeypatch, capsys, signals):
    """Runs python -m snows.export; returns (what it said, exit code)."""

    def once(*given):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, given)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        try:
            shell(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err, code

    return once


def edited(folder, name, **values):
    """A JSON file of a run, with other values."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def test_a_run_leaves_the_files_that_it_is_asked_for(script, flags, tmp_path):
    folder = tmp_path / "run"
    out, _ = script("CNN_pruning/prune_NM.py", *flags, "--export", "packed", "--out_dir", folder)
    assert "zeros, asked = found   2:4 layers" in out
    assert "8 of 8" in out
    record = json.loads((folder / "export.json").read_text())["packed"]
    assert record["file"] == str(folder / "packed.safetensors")
    assert record["bytes"] == (folder / "packed.safetensors").stat().st_size
    assert record["zeros_asked"] == record["zeros_found"] > 0
    assert record["layers"] == record["nm_layers"] == 21
    assert record["largest_difference"] == 0
    (folder / "model.safetensors").unlink()
    (folder / "masks.safetensors").unlink()
    model, masks = snows.load_run(folder, ResNet(20, 10))
    assert len(masks) == 21
    assert json.loads((folder / "metrics.json").read_text())["sparsity"] == snows.sparsity(model)


def test_a_finished_run_is_exported_when_it_is_resumed(script, run):
    before = json.loads((run / "args.json").read_text())
    script("CNN_pruning/prune_NM.py", "--resume", run, "--export", "packed", "--half")
    assert json.loads((run / "export.json").read_text())["packed"]["half"]
    state = safetensors.torch.load_file(run / "packed.safetensors")
    assert state["conv1.weight"].dtype == torch.float16
    assert json.loads((run / "args.json").read_text()) == before


def test_the_module_exports_to_a_file_and_remembers_earlier_exports(ended, run, tmp_path):
    assert ended(run, "--to", "packed")[1] == 0
    out, code = ended(run, "--to", "packed", "--out", tmp_path / "x.safetensors")
    assert (code, "packed" in out) == (0, True)
    assert (tmp_path / "x.safetensors").exists()
    assert json.loads((run / "export.json").read_text())["packed"]["file"] == str(tmp_path / "x.safetensors")


def test_a_network_with_another_accuracy_is_warned_of(ended, run):
    edited(run, "metrics.json", accuracy=99.0)
    assert "warning: the run measured an accuracy of 99.00 %, and here it is" in ended(run, "--to", "packed")[0]


def test_an_unfinished_run_is_not_exported(ended, run):
    edited(run, "metrics.json", finished=False)
    told = f"error: {run} is not finished: go on with {sys.executable} CNN_pruning/prune_NM.py --resume {run}\n"
    assert ended(run, "--to", "packed") == (told, 2)


def test_what_is_no_run_is_told(ended, tmp_path):
    out, code = ended(tmp_path, "--to", "packed")
    assert (out.count("\n"), code) == (1, 2)
    assert "holds no run that can be read" in out
    out, code = ended(tmp_path / "nowhere", "--to", "packed")
    assert (out.count("\n"), code) == (1, 2)


MINE = """
from resnet_cifar import ResNet
from snows.zoo.classifiers import Classifier, cifar_transform

network = lambda: ResNet(20, 10)
classifier = lambda: Classifier(ResNet(20, 10), cifar_transform(10))
number = lambda: 3
broken = lambda: 1 / 0
"""


@pytest.fixture
def mine(run, tmp_path):
    """A file with functions of one's own, for a run whose network nobody else knows."""
    edited(run, "args.json", arch="mine_cifar10")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_an_own_network_asks_for_its_factory(ended, run, mine):
    out, code = ended(run, "--to", "packed")
    assert out == (
        f"error: the network 'mine_cifar10' of {run} is not known here: give the function that makes it, as "
        f"--factory FILE.py:NAME.\n"
    )
    assert code == 2


def test_an_own_network_is_made_by_its_factory(ended, run, mine):
    out, code = ended(run, "--to", "packed", "--factory", f"{mine}:classifier")
    assert (code, "warning" in out) == (0, False)
    assert ended(run, "--to", "packed", "--factory", f"{mine}:network")[1] == 0  # of images between 0 and 1


def test_a_factory_imports_what_lies_beside_it(ended, run, mine):
    (mine.parent / "beside.py").write_text("from resnet_cifar import ResNet\n")
    mine.write_text("from beside import ResNet\nnetwork = lambda: ResNet(20, 10)\n")
    assert ended(run, "--to", "packed", "--factory", f"{mine}:network")[1] == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("number", "makes a int, and neither a network nor a Classifier"),
        ("broken", "cannot be called without arguments: division by zero"),
        ("missing", "cannot be called without arguments: it has no missing"),
    ],
)
def test_a_factory_that_makes_no_network_is_told(ended, run, mine, name, told):
    out, code = ended(run, "--to", "packed", "--factory", f"{mine}:{name}")
    assert out.startswith(f"error: --factory {mine}:{name} {told}")
    assert (out.count("\n"), code) == (1, 2)


def test_weights_of_another_network_are_refused(ended, run, mine, tmp_path):
    mine.write_text("from resnet_cifar import ResNet\nnetwork = lambda: ResNet(32, 10)\n")
    out, code = ended(run, "--to", "packed", "--factory", f"{mine}:network")
    assert out.startswith(f"error: cannot load {run}: ")
    assert code == 1


def test_a_path_that_cannot_be_written_is_told_before_anything_is_measured(ended, run, tmp_path):
    out, code = ended(run, "--to", "packed", "--out", tmp_path / "nowhere" / "x.safetensors")
    assert code == 1
    assert out == f"error: cannot write {tmp_path / 'nowhere' / 'x.safetensors'}: No such file or directory.\n"


def test_one_file_is_for_one_export(ended, run, tmp_path):
    assert ended(run, "--to", "packed", "pt2", "--out", tmp_path / "x.pt2") == (
        "error: --out is for a single --to.\n",
        2,
    )


def test_a_missing_package_is_told_before_anything_is_pruned(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    _, err = script("CNN_pruning/prune_NM.py", *flags, "--export", "onnx", "--out_dir", tmp_path / "run", code=2)
    assert err == (
        'error: onnx and onnxscript and onnxruntime not installed, which onnx needs: pip install ".[deploy]" in a '
        "checkout.\n"
    )
    _, err = script("CNN_pruning/prune_NM.py", *flags, "--export", "int8", "--half", code=2)
    assert err == "error: --half is for the other exports: int8 has a precision of its own.\n"


@pytest.mark.parametrize("how", [["--half"], ["--int8_tolerance", 2.0], ["--int8_float", "fc"]], ids=lambda how: how[0])
def test_the_flags_of_exports_are_refused_where_there_is_none(script, flags, how):
    _, err = script("CNN_pruning/prune_NM.py", *flags, *how, code=2)
    assert err == f"error: {how[0]} without --export: name the files to make, or leave it out.\n"


def test_a_folder_for_timm_of_another_network_is_refused_before_anything_is_pruned(script, flags, tmp_path):
    _, err = script("CNN_pruning/prune_NM.py", *flags, "--export", "timm", "--out_dir", tmp_path / "run", code=2)
    assert err.startswith("error: only networks that timm makes by a name")
    assert not (tmp_path / "run").exists()


def test_timms_networks_go_out_to_a_folder_and_come_in_again(script, small, tmp_path):
    network = [
        "--arch",
        "timm/test_efficientnet",
        "--random_weights",
        "--num_classes",
        8,
        "--dset",
        small / "images.npz",
    ]
    network += ["--mean", 0.1, 0.2, 0.3, "--std", 1, 1, 1, "--algo", "MP"]
    script("CNN_pruning/unstr.py", *network, "--export", "timm", "--out_dir", tmp_path / "run")
    folder = tmp_path / "run" / "timm"
    card = (folder / "README.md").read_text()
    assert "| network | timm/test_efficientnet |" in card
    assert "| command | `python unstr.py --arch timm/test_efficientnet" in card
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    again = ["--arch", f"local-dir:{folder}", "--dset", small / "images.npz", "--algo", "MP", "--target_sparsity", 0.9]
    script("CNN_pruning/unstr.py", *again, "--out_dir", tmp_path / "again")
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert second["dense_accuracy"] == first["accuracy"]
    assert second["dense_sparsity"] == first["sparsity"]
