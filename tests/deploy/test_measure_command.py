"""`python -m snows.measure`: what it leaves in a run's folder, and what it refuses in one line."""

import csv
import json
import sys

import pytest
import torch

from snows.cli import measure
from snows.deploy.backends import BACKENDS, Backend
from snows.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("measured")


@pytest.fixture
def run(script, folder):
    """A run of masks alone."""
    if not (folder / "run").exists():
        script("VIT_pruning/prune_NM.py", "--algo", "MP", "--skip_evaluation", "--out_dir", folder / "run")
    return folder / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["measure", *map(str, argv)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        measure.main()
        return capsys.readouterr().out

    return call


FEW = ("--backends", "torch", "torch CSR", "--runs", "2")


def test_a_run_says_what_its_layers_compute(run):
    metrics = json.loads((run / "metrics.json").read_text())
    layers = list(csv.DictReader((run / "layers.csv").open()))
    for layer in layers:
        rows, columns = map(int, layer["shape"].split("x"))
        tokens = int(layer["dense_macs"]) / (rows * columns)
        assert tokens == 17  # 4 x 4 patches and the class
        assert int(layer["macs"]) == int(layer["dense_macs"]) / 2
    pruned = sum(int(layer["dense_macs"]) for layer in layers)
    assert metrics["dense_macs"] - metrics["macs"] == pruned / 2
    assert metrics["image_shape"] == [1, 8, 8]


def test_it_leaves_the_times_and_a_table_in_the_page(run, command):
    said = command(run, *FEW)
    record = json.loads((run / "latency.json").read_text())
    assert [(row["backend"], row["network"]) for row in record["rows"]] == [
        (backend, network) for backend in ("torch", "torch CSR") for network in ("dense", "pruned")
    ]
    assert (record["runs"], record["threads"], record["batch_size"]) == (2, 1, 1)
    assert record["image_shape"] == [1, 8, 8]
    assert record["said"] in said
    page = (run / "report.html").read_text()
    assert "<h2>Latency</h2>" in page
    assert "The pruned network is" in page
    assert "no layer has zeros that it could skip" in page


def test_a_page_of_a_run_that_was_not_measured_has_no_such_table(run):
    (run / "latency.json").unlink(missing_ok=True)
    measure.write_report([run], run / "report.html")
    assert "Latency" not in (run / "report.html").read_text()


def test_what_is_not_installed_is_named(run, command, monkeypatch):
    absent = {name: Backend(None, needs=("no_such_package",)) for name in ("onnxruntime", "OpenVINO int8")}
    monkeypatch.setattr(measure, "BACKENDS", {"torch": BACKENDS["torch"], **absent})
    said = command(run, "--runs", 1)
    assert 'not installed: onnxruntime, OpenVINO int8 (pip install ".[deploy]" in a checkout)' in said
    assert json.loads((run / "latency.json").read_text())["not_installed"].keys() == absent.keys()
    with pytest.raises(UsageError, match="no_such_package not installed, which onnxruntime needs: pip install"):
        command(run, "--backends", "onnxruntime")


@pytest.fixture
def changed(run, tmp_path):
    """The folder of the same run with other values in its files."""

    def copy(**files):
        for file in run.glob("*.json"):
            values = json.loads(file.read_text())
            for name, value in files.get(file.stem, {}).items():
                values[name] = value
            (tmp_path / file.name).write_text(json.dumps(values))
        for file in run.glob("*.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


def test_an_unfinished_run_is_refused(changed, command):
    with pytest.raises(UsageError, match=r"is not finished: go on with .*python\S* VIT_pruning/prune_NM\.py --resume"):
        command(changed(metrics={"finished": False}), *FEW)


def test_a_folder_without_a_run_is_refused(tmp_path, command):
    with pytest.raises(UsageError, match="holds no run that can be read"):
        command(tmp_path, *FEW)


def test_a_network_that_nobody_knows_needs_a_factory(changed, command, tmp_path):
    folder = changed(args={"arch": "mine"})
    with pytest.raises(UsageError, match=r"the network 'mine' of .* is not known here: .* as --factory FILE\.py:NAME"):
        command(folder, *FEW)
    factory = tmp_path / "mine.py"
    factory.write_text("from vit_small import vit_digits\n\n\ndef build():\n    return vit_digits()\n")
    command(folder, *FEW, "--factory", f"{factory}:build")


def test_a_run_of_an_earlier_version_needs_the_shape_of_an_image(changed, command):
    folder = changed(metrics={"image_shape": None})
    with pytest.raises(UsageError, match="give --image_shape CHANNELS HEIGHT WIDTH"):
        command(folder, *FEW)
    with pytest.raises(UsageError, match=r"the network takes no images of 7x8x8 \(--image_shape\)"):
        command(folder, *FEW, "--image_shape", 7, 8, 8)
    command(folder, *FEW, "--image_shape", 1, 8, 8, "--batch_size", 3)
    assert json.loads((folder / "latency.json").read_text())["image_shape"] == [1, 8, 8]


def test_images_are_of_the_shape_that_the_run_had():
    assert measure.images_of({"image_shape": [3, 8, 9]}, None, 2).shape == torch.Size([2, 3, 8, 9])
