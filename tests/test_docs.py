"""What is written for readers holds: links, paths, names, flags, fields, and the recipes of the README."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import safetensors.torch
import torch
from helpers import ROOT
from resnet_cifar import ResNet

import snows

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
README = (ROOT / "README.md").read_text()
FOLDERS = "snows|CNN_pruning|VIT_pruning|bench|checkpoints|docs|results|tests"
SALIENCY, METHODS, NETWORKS = "snows/masks/saliency.py", "snows/methods.py", "CNN_pruning/utils.py"  # of the recipes
FAST = ["--k_step", "1", "--max_CG_iterations", "2", "--ngrads", "6", "--batch_size", "4", "--schedule", "0"]
FAST += ["--joint_steps", "1", "--joint_CG_iterations", "2", "--skip_evaluation"]
FEW_LAYERS = ["--target_sparsity", "0.2", "--skip", "layer1.*", "layer2.*"]


def text_of(name):
    """A page, without the history of paths that are gone."""
    text = (ROOT / name).read_text()
    return text.split("\n## [0.2.0]")[0] if name == "CHANGELOG.md" else text


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file(name):
    links = re.findall(r"\]\(([^)#\s]+)", text_of(name))
    inner = [link for link in links if "://" not in link]
    assert [link for link in inner if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_path_that_is_named_exists(name):
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)[`:]", text_of(name))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_function_that_the_architecture_names_is_in_its_file():
    named = re.findall(r"`(snows/[\w/]+\.py):(\w+)`", text_of("docs/architecture.md"))
    assert len(named) > 30
    defined = {path: (ROOT / path).read_text() if (ROOT / path).exists() else "" for path, _ in named}
    pattern = r"^(?:def {0}\b|class {0}\b|{0}(?:: .+)? = )"
    assert [pair for pair in named if not re.search(pattern.format(pair[1]), defined[pair[0]], re.MULTILINE)] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name == "README.md" or name.startswith("docs/")])
def test_everything_that_is_named_of_the_library_is_there(name):
    named = set(re.findall(r"(?<!-m )\bsnows\.(\w+)(?![\w.])", text_of(name)))
    assert {each for each in named if not hasattr(snows, each)} == set()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9000


def test_ci_finds_the_test_command_in_the_readme():
    word = "requirements-test.txt"
    (line,) = [line for line in README.splitlines() if word in line]
    assert f"grep -m1 '{word}' README.md" in (ROOT / ".ci" / "run").read_text()
    checks = ("ruff check .", "ruff format --check .", "mypy", "python -m pytest -q -n 2")
    setup = f"    python3 -m venv .venv && .venv/bin/pip install -q -r {word}"
    assert line == " && ".join([setup, *(f".venv/bin/{check}" for check in checks)])


def test_the_table_of_flags_is_what_the_scripts_take():
    page = (ROOT / "docs" / "options.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "make_options.py"))["fill"](page) == page


@pytest.fixture
def run(script, small, tmp_path):
    """The folder of a run with a network on tiny images."""
    network = ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz"]
    script("CNN_pruning/unstr.py", *network, *FAST, *FEW_LAYERS, "--out_dir", tmp_path / "run")
    return tmp_path / "run"


def test_every_file_and_field_that_a_run_leaves_is_described(run):
    page = text_of("docs/run_folder.md")
    described = set(re.findall(r"`([\w./]+)`", page)) | {field.name for field in fields(snows.Options)}
    described |= {flag.lstrip("-") for flag in re.findall(r"`(--\w+)`", text_of("docs/options.md"))}
    found = {file.name for file in run.iterdir()}
    for name in ("metrics.json", "args.json", "environment.json", "calibration.json"):
        found |= json.loads((run / name).read_text()).keys()
    found |= json.loads((run / "layers.json").read_text())[0].keys()
    header, *_ = (run / "layers.csv").read_text().splitlines()
    found |= {re.sub(r"_\d+$", "", column) for column in header.split(",")}
    assert found - described == set()


def recipes():
    """File -> the lines that a recipe of the README adds at its end."""
    (block,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    return dict(re.findall(r"^# (\S+\.py): .*\n((?:(?!# \S+\.py: ).*\n)+)", block, re.MULTILINE))


@pytest.fixture
def followed(small, tmp_path):
    """Runs a script in a checkout where a recipe was followed; returns the run's folder."""

    def follow(path, *flags):
        for folder in ("snows", "CNN_pruning"):
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        file = tmp_path / path
        file.write_text(f"{file.read_text()}\n\n{recipes()[path]}")
        command = [sys.executable, tmp_path / "CNN_pruning" / "unstr.py", "--dset", small / "images.npz", *FAST, *flags]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [*map(str, command), "--out_dir", str(tmp_path / "run")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / "run"

    return follow


def name_in(path):
    """What a recipe calls its addition."""
    return re.search(r'\["(\w+)"\] =', recipes()[path])[1]


def test_the_recipes_are_three():
    assert tuple(recipes()) == (SALIENCY, METHODS, NETWORKS)


def test_a_mask_by_the_readmes_recipe_is_another_than_by_magnitude(followed, small):
    flags = ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt", "--algo", "MP"]
    folder = followed(SALIENCY, *flags, "--mask_alg", name_in(SALIENCY))
    chosen = safetensors.torch.load_file(folder / "masks.safetensors")
    dense = ResNet(20, 10)
    dense.load_state_dict(torch.load(small / "resnet20.pt"))
    magnitudes = snows.prune(dense, None, snows.Unstructured(0.8), algo="MP").masks
    assert chosen.keys() == magnitudes.keys()
    assert any(not chosen[name].equal(magnitudes[name]) for name in chosen)


def test_a_method_by_the_readmes_recipe_takes_its_options(followed, small):
    flags = ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt"]
    folder = followed(METHODS, *flags, *FEW_LAYERS, "--algo", name_in(METHODS))
    metrics = json.loads((folder / "metrics.json").read_text())
    wanted = re.search(r"k_step=(\d+)", recipes()[METHODS])[1]
    assert metrics["options"]["k_step"] == int(wanted)
    assert metrics["curvature_products"] > 0


def test_a_network_by_the_readmes_recipe_has_its_depth(followed):
    folder = followed(NETWORKS, "--arch", name_in(NETWORKS), "--random_weights", "--algo", "MP")
    depth = int(re.search(r"ResNet\((\d+), ", recipes()[NETWORKS])[1])
    masks = safetensors.torch.load_file(folder / "masks.safetensors")
    assert len([name for name in masks if "downsample" not in name]) == depth


def test_versions_and_citations_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == snows.__version__
    assert f"## [{snows.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    (title,) = re.findall(r"^\s+title\s+= \{(.+)\},$", README, re.MULTILINE)
    assert f'title: "{title}"' in citation
