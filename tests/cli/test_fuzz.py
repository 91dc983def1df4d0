"""Bad input, drawn at random: command lines and files that no one should write never end in a traceback.

The default run tries a few of each, always the same; `-m slow` tries many, anew each time.
"""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from snows.cli.journal import Journal
from snows.errors import SnowsError
from snows.masks.files import read_masks
from snows.network.network import Network
from snows.result import LayerRecord, Step
from snows.zoo.checkpoints import read_state
from snows.zoo.classifiers import load_checkpoint
from snows.zoo.images import Data, normalised, npz

CHECKS = dict(deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=12, derandomize=True, **CHECKS)
MANY = settings(max_examples=300, **CHECKS)

NUMBERS = st.sampled_from(["0", "1", "2", "3", "-1", "0.5", "1e400", "nan", "inf", "", "x", str(10**30), "1,5", "²"])
WORDS = st.one_of(
    st.sampled_from(["", " ", ".", "..", "/", "nan", "*", "[", "--", "CON", "é\n", "a" * 300]), st.text(max_size=8)
)
PATHS = st.sampled_from(["", ".", "nowhere", "/dev/null", "/proc/self/mem", "a" * 300, "images.npz", "resnet20.pt"])
PATHS = st.one_of(PATHS, st.sampled_from(["text.npz", "text.pt", "text.safetensors", "\udcff.pt", "é/é"]))
FLAGS = {
    "--arch": st.one_of(
        WORDS, st.sampled_from(["timm/", "torchvision/", "timm/lcnet_0", "resnet20_cifar10 ", "a/b/c"])
    ),
    "--checkpoint": PATHS,
    "--dset": st.one_of(PATHS, st.sampled_from(["digits", "imagenet", "cifar10"])),
    "--data_dir": PATHS,
    "--masks": PATHS,
    "--classes": PATHS,
    "--checkpoint_key": st.one_of(WORDS, st.sampled_from(["layer1", "state_dict"])),
    "--resize": st.sampled_from(["0", "1", "3", "-1", "x", str(10**30)]),
    "--resume": PATHS,
    "--device": st.sampled_from(["cpu", "", "cuda:99", "meta", "cpu:7", "abacus", "mps", "xpu"]),
    "--preset": st.sampled_from(["best", "paper", "", "both"]),
    "--algo": st.sampled_from(["MP", "MP+", "SNOWS", "snows", ""]),
    "--allocation": st.sampled_from(["uniform", "global", "", "x"]),
    "--targets": st.sampled_from(["same", "dense", ""]),
    "--batching": st.sampled_from(["True", "false", "", "1"]),
    "--biases": st.sampled_from(["True", "false", "", "1"]),
    **dict.fromkeys(
        ["--mean", "--std"], st.one_of(NUMBERS, st.sampled_from([["0.5", "0.5"], ["0.5"] * 3, ["0.5"] * 4]))
    ),
    **dict.fromkeys(["--num_classes", "--ngrads", "--test_batch_size", "--num_workers", "--seed", "--k_step"], NUMBERS),
    **dict.fromkeys(["--newton_steps", "--max_CG_iterations", "--cg_tolerance", "--damping", "--batch_size"], NUMBERS),
    **dict.fromkeys(["--target_sparsity", "--max_layer_sparsity"], NUMBERS),
    **dict.fromkeys(
        ["--skip_broken", "--mirror", "--deterministic", "--evaluate_layers", "--quiet", "--verbose"], st.just([])
    ),
    "--no_such_flag": WORDS,
}


@st.composite
def command_lines(draw):
    """One to three odd flags."""
    words = []
    for flag in draw(st.lists(st.sampled_from(sorted(FLAGS)), min_size=1, max_size=3, unique=True)):
        value = draw(FLAGS[flag])
        words += [flag, *([value] if isinstance(value, str) else value)]
    return [word for word in words if "\0" not in word]


@pytest.fixture(scope="module")
def odd(small, tmp_path_factory):
    """A working directory with a small dataset, a checkpoint that fits it, and files that are not what they say."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(small, folder, dirs_exist_ok=True)
    for kind in ("npz", "pt", "safetensors"):
        (folder / f"text.{kind}").write_text("not what its name says")
    return folder


SMALL = ["--arch", "resnet20_cifar10", "--checkpoint", "resnet20.pt", "--dset", "images.npz", "--ngrads", "4"]
SMALL += ["--k_step", "0", "--schedule", "0", "--max_CG_iterations", "1", "--preconditioner", "none"]
SMALL += ["--joint_steps", "1", "--joint_CG_iterations", "1"]


def try_command(script, odd, monkeypatch, words):
    """A command line ends well, or in one line with code 1 or 2; a folder it left is whole."""
    monkeypatch.chdir(odd)
    monkeypatch.setattr("snows.cli.one_run.write_report", lambda folders, out: None)  # slow, and tested elsewhere
    out = odd / f"run{len(list(odd.glob('run*')))}"
    captured, code = script.ended("CNN_pruning/unstr.py", *SMALL, "--out_dir", out, *words)
    torch.use_deterministic_algorithms(False)
    event(f"exit code {code}")
    assert code in (0, 1, 2)
    assert "Traceback" not in captured.err
    assert "unexpected" not in captured.err, captured.err
    if code:
        assert captured.err.strip().splitlines()[-1].count("error:") == 1, captured.err
    elif out.exists():
        assert json.loads((out / "metrics.json").read_text())["finished"]
    assert not list(odd.rglob("*.tmp"))
    assert code == 0 or not (out / "model.safetensors").exists()


@FEW
@given(words=command_lines())
def test_an_odd_command_line_ends_in_one_line(script, odd, monkeypatch, words):
    try_command(script, odd, monkeypatch, words)


@pytest.mark.slow
@MANY
@given(words=command_lines())
def test_many_odd_command_lines_end_in_one_line(script, odd, monkeypatch, words):
    try_command(script, odd, monkeypatch, words)


def spoiled(content):
    """The bytes of a file, damaged: cut, overwritten, shifted, or replaced."""
    size = len(content)
    places = st.one_of(
        st.integers(0, size - 1), st.integers(0, min(size, 300) - 1), st.integers(max(0, size - 300), size - 1)
    )
    changes = st.tuples(places, st.binary(min_size=1, max_size=8))
    overwritten = st.lists(changes, min_size=1, max_size=4).map(lambda found: overwrite(content, found))
    inserted = changes.map(lambda change: content[: change[0]] + change[1] + content[change[0] :])
    return st.one_of(places.map(lambda end: content[:end]), overwritten, inserted, st.binary(max_size=64))


def overwrite(content, changes):
    result = bytearray(content)
    for place, new in changes:
        result[place : place + len(new)] = new
    return bytes(result)


TENSORS = st.sampled_from(
    [
        torch.ones(4, 2, 3, 3),
        torch.zeros(4, 2, 3, 3),
        torch.full((4, 2, 3, 3), float("nan")),
        torch.ones(4, 2, 3, 3, dtype=torch.complex64),
        torch.ones(4, 2, 3, 3, dtype=torch.bool),
        torch.ones(4, 2, 3, 3, dtype=torch.float8_e4m3fn),
        torch.ones(4, 2, 3, 3).to_sparse(),
        torch.ones(4, 2, 3, 3, device="meta"),
        torch.quantize_per_tensor(torch.ones(4, 2, 3, 3), 0.1, 0, torch.qint8),
        torch.zeros(0),
        torch.tensor(1.0),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nn.Parameter(torch.ones(4, 2, 3, 3)),
    ]
)
KEYS = st.one_of(
    st.sampled_from(["conv.weight", "conv", "module.conv.weight", "bias", "", "conv.bias", 3, None, ("a",)])
)
VALUES = st.recursive(
    st.one_of(TENSORS, st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(st.dictionaries(KEYS, inner, max_size=3), st.lists(inner, max_size=2)),
    max_leaves=4,
)
STATES = st.one_of(VALUES, st.dictionaries(KEYS, TENSORS, min_size=1, max_size=3)).flatmap(
    lambda state: st.sampled_from([state, {"state_dict": state}, {"model": state}])
)


@contextmanager
def refused_in_one_line():
    """What is not taken is refused in one line."""
    try:
        yield
    except SnowsError as error:
        event("refused")
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error}") from error


class One(torch.nn.Module):
    """One convolution, whose checkpoint and masks are read."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def read_all(path):
    """Every reader of tensors either takes a file or says in one line why not."""
    for reader in (read_state, lambda p: load_checkpoint(One(), p), lambda p: read_masks(p, Network(One()))):
        with refused_in_one_line():
            reader(path)
            event("read")


def try_saved(tmp_path, state):
    try:
        torch.save(state, tmp_path / "state.pt")
    except Exception:
        assume(False)
    read_all(tmp_path / "state.pt")


def try_spoiled(tmp_path, data):
    state = {"conv.weight": torch.arange(72.0).view(4, 2, 3, 3), "conv.bias": torch.zeros(4)}
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"valid{suffix}"
        (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, path)
        spoil = tmp_path / f"spoiled{suffix}"
        spoil.write_bytes(data.draw(spoiled(path.read_bytes())))
        read_all(spoil)


def try_images(tmp_path, arrays):
    """What npz takes can be drawn from and looked at."""
    np.savez(tmp_path / "images.npz", **arrays)
    with refused_in_one_line():
        loaded = Data(*npz(tmp_path / "images.npz", normalised((0.5,), (0.5,))))
        loaded.calibration(1, 0)
        list(loaded.test_batches(2))
        event("read")


def arrays():
    shapes = st.lists(st.integers(0, 4), min_size=0, max_size=5).map(tuple)
    dtypes = st.sampled_from([np.uint8, np.int64, np.float32, np.bool_, np.complex64, "U3", "datetime64[s]"])
    some = st.tuples(shapes, dtypes).map(lambda drawn: np.ones(drawn[0]).astype(float).astype(drawn[1]))
    images = st.tuples(
        st.integers(0, 3), st.sampled_from([(4, 4), (4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 4), (0, 4), (4, 0, 3)])
    )
    images = images.map(lambda drawn: np.ones((drawn[0], *drawn[1]), np.uint8))
    labels = st.tuples(st.integers(0, 3), st.sampled_from([0, -1, 2**40, 0.5, float("nan"), "a", True, 1j]))
    labels = labels.map(lambda drawn: np.array([drawn[1]] * drawn[0]))
    x, y = st.one_of(images, some), st.one_of(labels, labels, some)
    fitting = st.tuples(images, labels).filter(lambda xy: len(xy[0]) == len(xy[1]))
    whole = st.tuples(fitting, fitting).map(
        lambda p: dict(zip(("x_train", "y_train", "x_test", "y_test"), p[0] + p[1]))
    )
    return whole | st.fixed_dictionaries({}, optional={"x_train": x, "y_train": y, "x_test": x, "y_test": y, "z": some})


def try_spoiled_images(tmp_path, data):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "valid.npz", x_train=images, y_train=np.arange(3), x_test=images, y_test=np.arange(3))
    (tmp_path / "spoiled.npz").write_bytes(data.draw(spoiled((tmp_path / "valid.npz").read_bytes())))
    with refused_in_one_line():
        npz(tmp_path / "spoiled.npz", normalised((0.5,), (0.5,)))


def try_spoiled_step(tmp_path, data):
    """A step comes back as it was written or not at all."""
    journal = Journal(tmp_path)
    journal.clear()
    weight = torch.arange(8.0).view(2, 4)
    journal.append(Step(LayerRecord(name="a", sweep=0, shape=(2, 4), sparsity=0.5), weight > 3, weight, torch.ones(2)))
    (path,) = journal.folder.iterdir()
    path.write_bytes(data.draw(spoiled(path.read_bytes())))
    with refused_in_one_line():
        (step,) = journal
        assert torch.equal(step.weight, weight)
        assert torch.equal(step.mask, weight > 3)


READERS = {"saved": (try_saved, STATES), "images": (try_images, arrays())}
READERS |= {f.__name__[4:]: (f, st.data()) for f in (try_spoiled, try_spoiled_images, try_spoiled_step)}


@pytest.mark.parametrize("reader", READERS)
def test_an_odd_file_is_read_or_refused_in_one_line(tmp_path, reader):
    attempt, inputs = READERS[reader]
    FEW(given(inputs)(lambda value: attempt(tmp_path, value)))()


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_odd_files_are_read_or_refused_in_one_line(tmp_path, reader):
    attempt, inputs = READERS[reader]
    settings(MANY, max_examples=2000)(given(inputs)(lambda value: attempt(tmp_path, value)))()
