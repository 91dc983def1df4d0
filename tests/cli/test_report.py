"""What a run shows: its page, its bar, its lines."""

import io
import json
import re
import sys

import pytest

from snows.cli import console, report
from snows.errors import UsageError
from snows.result import LayerRecord

FAST = [
    "--k_step",
    "1",
    "--max_CG_iterations",
    "2",
    "--ngrads",
    "16",
    "--schedule",
    "0",
    "--joint_steps",
    "1",
    "--joint_CG_iterations",
    "2",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def runs(script, folders):
    """A run that measures the accuracy after each layer, and one of the mask alone."""
    if not (folders / "one").exists():
        flags = ["--evaluate_layers", "--layers_to_prune", "mlp", "--out_dir", folders / "one"]
        out, _ = script("VIT_pruning/prune_NM.py", *FAST, *flags)
        assert out.count("accuracy 9") >= 8
        script("VIT_pruning/prune_NM.py", "--algo", "MP", "--out_dir", folders / "<two>")
    return folders / "one", folders / "<two>"


def module(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    report.main()
    return capsys.readouterr().out.strip()


def test_a_run_leaves_a_page_that_needs_nothing_else(runs, monkeypatch, capsys):
    page = (runs[0] / "report.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    shown = ["Accuracy", "Accuracy after each layer", "Conjugate gradients", "Sparsity", "Loss", "Products", "Time"]
    assert captions == shown
    assert page.count("<svg") == len(shown)
    assert not re.search(r"<(script|link|img|iframe)|src=|url\(h|@import|href=\"(?!#|data:)", page)
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert f"{metrics['accuracy']:.2f}" in page
    assert "max_CG_iterations" in page
    assert metrics["options"]["k_step"] == 1
    records = json.loads((runs[0] / "layers.json").read_text())
    assert all(0 <= record["accuracy"] <= 100 and 1 <= len(record["residuals"][0]) <= 2 for record in records)
    assert records[-1]["accuracy"] == metrics["accuracy"]
    (runs[0] / "report.html").unlink()
    assert module(monkeypatch, capsys, runs[0]) == str(runs[0] / "report.html")
    assert (runs[0] / "report.html").read_text() == page


def test_several_runs_are_compared(runs, monkeypatch, capsys, tmp_path):
    module(monkeypatch, capsys, *runs, "--out", tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert "<h1>2 runs</h1>" in page
    assert "Settings that differ" in page
    assert "<td>layers_to_prune</td>" in page
    assert "&lt;two&gt;" in page
    assert "<two>" not in page
    assert re.findall("<figcaption>(.*?)</figcaption>", page)[-2:] == ["Accuracy", "Sparsity"]  # of the mask alone


def test_a_folder_without_a_run_is_refused(tmp_path, runs):
    with pytest.raises(UsageError, match=r"holds no run that can be read: metrics\.json"):
        report.write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "broken").mkdir()
    for file in runs[0].glob("*.json"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "layers.json").write_text('[{"name": "fc"}]')
    with pytest.raises(UsageError, match=r"layers\.json"):
        report.write_report([tmp_path / "broken"], tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = LayerRecord(
    name="layer1.conv",
    sweep=0,
    shape=(4, 4),
    sparsity=0.5,
    loss_before=2.0,
    loss_after=0.25,
    newton_steps=1,
    cg_iterations=5,
    products=5.0,
    seconds=0.1,
)


@pytest.mark.parametrize(
    ("terminal", "style", "bar", "lines"),
    [(True, "", 1, 0), (True, "verbose", 1, 1), (True, "quiet", 0, 0), (False, "", 0, 1), (False, "quiet", 0, 0)],
)
def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, terminal, style, bar, lines):
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    progress = console.Progress("SNOWS", style, earlier=1)
    for _ in range(3):
        progress(RECORD, 3)
    progress.close()
    assert ("3/3 layers" in out.getvalue()) == bar
    assert ("15 products, layer1.conv 2 -> 0.25" in out.getvalue()) == bar
    assert out.getvalue().count("% zero   loss") == 2 * lines  # not again what an earlier run had finished


def test_the_last_line_says_how_many_layers_were_not_solved(tmp_path):
    metrics = dict(algo="SNOWS", dense_accuracy=90.0, masked_accuracy=None, accuracy=80.0, dense_sparsity=0.0)
    metrics |= dict(sparsity=0.5, seconds=1.0, curvature_products=2.0, left_dense={"fc": "not selected"}, problems={})
    assert console.summary(metrics, tmp_path).splitlines()[-1] == f"  saved in {tmp_path}"
    metrics["problems"] = {"a": "the loss is not finite", "b": "the gradient is not finite"}
    last = console.summary(metrics, tmp_path).splitlines()[-1]
    assert last == "  not solved, weights as they were: a: the loss is not finite; b: the gradient is not finite"
