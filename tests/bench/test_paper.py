"""bench/paper.py with random weights on small networks: its grid, what is missing, workers, and the tables."""

import sys
from dataclasses import replace

import common
import paper
import paper_networks
import paper_tables
import pytest
import torch
from paper_networks import NETWORKS, Entry

import snows
from snows.errors import Interrupted
from snows.options import PRESETS

SMALL = {
    "resnet20_cifar10": replace(NETWORKS["resnet20_cifar10"], images=4),
    "vit": Entry("A ViT", "timm/test_vit", "imagenet", 4, 3, paper_networks.BLOCKS),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the bench on two small networks; returns the rows that its results file then holds."""
    for module in (paper, paper_networks):
        monkeypatch.setattr(module, "NETWORKS", SMALL)

    def once(*flags):
        given = ["paper.py", "--out", tmp_path / "paper.csv", "--networks", *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        paper.main()
        return common.read(tmp_path / "paper.csv")

    return once


def test_the_grid_is_the_papers_and_its_fields():
    args = paper.flags().parse_args(["--seeds", "0", "1"])
    runs = paper.grid(args)
    assert {run["network"] for run in runs} == {
        "resnet20_cifar10", "resnet50_cifar100", "resnet50", "mobilenet_v2", "efficientnet_lite0",
        "vit_b_16", "vit_l_16", "deit_s", "convnext_t",
    }  # fmt: skip
    assert {run["pattern"] for run in runs} == {"0.5", "0.6", "0.7", "0.8", "0.9", "2:4", "1:4", "4:8"}
    methods = {"MP", "MP+", "Wanda", "SparseGPT", *(f"SNOWS {preset}" for preset in PRESETS)}
    assert {run["method"] for run in runs} == methods
    assert len(runs) == 9 * 8 * (2 * len(methods) - 1)  # magnitude masks alone depend on no seed
    assert {run["images"] for run in paper.grid(paper.flags().parse_args(["--images", "7"]))} == {7}


def test_a_run_has_the_options_of_its_method():
    def arguments(**run):
        return paper.arguments_of({"network": "vit_b_16", "pattern": "0.7", "seed": 5, **run})

    published = arguments(method="SNOWS paper")
    assert published["options"] == snows.Options.preset("paper", k_step=3, seed=5)
    assert published["pattern"] == snows.Unstructured(0.7)
    assert arguments(method="SNOWS best", pattern="4:8") == {
        "pattern": snows.NM(4, 8), "options": snows.Options(seed=5), "algo": "SNOWS",
    }  # fmt: skip
    wanda = arguments(method="Wanda")
    assert (wanda["mask_alg"], wanda["algo"]) == ("Wanda", "MP")


@pytest.mark.parametrize(("name", "dense"), [("mobilenet_v2", 18), ("deit_s", 2), ("convnext_t", 20)])
def test_stems_and_depthwise_convolutions_stay_dense_and_the_heads_of_transformers(name, dense):
    with torch.device("meta"):
        model = paper_networks.load_classifier(NETWORKS[name].arch, {}, random_weights=True).model
    chosen = NETWORKS[name].prunes(model)
    layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len([layer for layer in layers if not chosen(layer)]) == dense


def test_random_weights_run_through_the_same_code_and_only_once(run, tmp_path, capsys):
    flags = ["--random_weights", "--patterns", "2:4", "--methods", "MP", "Wanda"]
    rows = run(*flags)
    assert [(row["network"], row["pattern"], row["method"]) for row in rows] == [
        (network, "2:4", method) for network in SMALL for method in ("MP", "Wanda")
    ]
    assert all(row["logit_error"] > 0 and row["sparsity"] > 0.3 for row in rows)
    assert [row["images"] for row in rows] == [4] * 4
    text = (tmp_path / "paper.md").read_text()
    assert text.startswith("## ResNet-20, CIFAR-10, 4 images\n\nDense: ")
    assert "| pattern | MP | Wanda |" in text
    assert "## A ViT, 4 images" in text
    assert (tmp_path / "paper.tex").read_text().count(r"\begin{tabular}{lrr}") == 2
    assert (tmp_path / "figures" / "paper.svg").stat().st_size > 0
    capsys.readouterr()
    assert run(*flags) == rows
    assert "of" not in capsys.readouterr().out.split()  # "1 of 4": nothing is measured again


def test_a_run_that_is_interrupted_is_not_left_out_but_ends_the_command(run, monkeypatch, capsys):
    def stopped(*job, **how):
        raise Interrupted("interrupted after 2 layers", KeyboardInterrupt())

    flags = ["--random_weights", "--patterns", "2:4", "--methods", "MP"]
    monkeypatch.setattr(snows, "prune", stopped)
    with pytest.raises(Interrupted):
        run(*flags)
    assert "left out" not in capsys.readouterr().out


def test_a_network_that_lacks_something_is_left_out_with_what_to_do(run, small, tmp_path, capsys):
    torch.save(torch.load(small / "resnet20.pt"), tmp_path / "resnet20_cifar10.pt")
    where = ["--weights_dir", tmp_path, "--data_dir", tmp_path / "data", "--networks", "resnet20_cifar10"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar10").mkdir()
    assert run(*where, "--methods", "MP", "--patterns", "2:4") == []
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("resnet20_cifar10: left out: images: ")
    assert said[0].endswith(". Put cifar10.npz, or a folder cifar10 with train and val, into --data_dir.")
    assert said[1:] == ["no row to make a table of"]
    (tmp_path / "data" / "cifar10.npz").write_bytes((small / "images.npz").read_bytes())
    assert run(*where, "--check") == []
    assert capsys.readouterr().out == "resnet20_cifar10: weights and images are at hand\n"
    (row,) = run(*where, "--methods", "MP", "--patterns", "2:4")
    assert row["test_images"] == 8
    torch.save({**torch.load(small / "resnet20.pt"), "fc.bias": torch.ones(10)}, tmp_path / "resnet20_cifar10.pt")
    assert run(*where, "--methods", "MP", "--patterns", "1:4") == [row]
    assert "holds rows of other weights" in capsys.readouterr().out
    (tmp_path / "resnet20_cifar10.pt").write_bytes(b"")
    run(*where, "--check")
    said = capsys.readouterr().out
    assert "left out: weights: " in said
    assert "Put a file resnet20_cifar10.pt (or .pth, .bin, .safetensors) into --weights_dir." in said


def test_workers_are_this_command_on_each_device(monkeypatch):
    started = []

    class Process:
        def __init__(self, command):
            started.append(command[2:])

        def wait(self):
            return 0 if "cuda:0" in started[0] else 1

        def poll(self):
            return 0

    monkeypatch.setattr(paper.subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--devices", "cuda:0", "cuda:1", "--workers", "2"])
    paper.start_workers(["cuda:0", "cuda:1"], 2)
    assert [paper.flags().parse_args(flags).devices for flags in started] == [["cuda:0"]] * 2 + [["cuda:1"]] * 2
    args = [paper.flags().parse_args(flags) for flags in started]
    assert [(each.workers, each.worker) for each in args] == [(1, True)] * 4
    started.clear()
    monkeypatch.setattr(sys, "argv", ["paper.py"])
    with pytest.raises(snows.SnowsError, match="2 of 2 workers failed: start the same command to go on"):
        paper.start_workers(["cuda:1"], 2)


def test_the_tables_hold_means_over_the_seeds_and_the_best_in_bold():
    rows = [
        {"network": "a_b", "pattern": pattern, "method": method, "seed": seed, "images": 1000, "accuracy": accuracy,
         "dense_accuracy": 91.0, "sparsity": 0.5}
        for pattern, method, seed, accuracy in (
            ("2:4", "MP", 0, 50.0), ("2:4", "SNOWS", 0, 80.0), ("2:4", "SNOWS", 1, 82.0), ("0.5", "SNOWS", 0, 90.0),
        )
    ]  # fmt: skip
    titles, methods = {"a_b": "A_B"}, ("SNOWS", "MP")
    assert paper_tables.markdown(rows, titles, methods).splitlines()[-3:] == [
        "| --- | --- | --- |", "| 0.5 | 90.00 |  |", "| 2:4 | 81.00 ± 1.41 | 50.00 |",
    ]  # fmt: skip
    lines = paper_tables.latex(rows, titles, methods).splitlines()
    assert r"\caption{A\_B, 1,000 images (dense: 91.00). Accuracy in percent.}" in lines
    assert r"2:4 & $\mathbf{81.00 \pm 1.41}$ & $50.00$ \\" in lines
    assert r"0.5 & $\mathbf{90.00}$ &  \\" in lines
    (axes,) = paper_tables.plot(rows, titles, methods).axes
    assert [line.get_xydata().tolist() for line in axes.lines[:3]] == [[[50, 90]], [[50, 81]], [[50, 50]]]
