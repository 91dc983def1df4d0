"""The scripts' commands on tiny data: run folders that load back, and bad input that ends in one line."""

import csv
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT
from resnet_cifar import ResNet
from torch import nn

from snows.cli import files, run_folder
from snows.zoo.images import Data, normalised, npz

FAST = ["--k_step", "1", "--newton_steps", "1", "--max_CG_iterations", "2", "--ngrads", "6", "--batch_size", "4"]
FAST += ["--joint_steps", "1", "--joint_CG_iterations", "2"]


def shell(script, *flags, cwd=ROOT):
    """Run a script of either folder in a process of its own; its standard output."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cifar_flags(small):
    return ["--arch", "resnet20_cifar10", "--checkpoint", small / "resnet20.pt", "--dset", small / "images.npz", *FAST]


def test_the_default_prunes_the_network_that_ships_and_its_folder_loads_back(tmp_path):
    flags = ["--ngrads", "64", "--batch_size", "64", "--schedule", "1", "--out_dir", tmp_path / "run"]
    out = shell("CNN_pruning/unstr.py", *FAST, *flags)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dense_accuracy"] == pytest.approx(98.32, abs=0.2)
    assert metrics["accuracy"] > metrics["masked_accuracy"] + 5
    assert metrics["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert {"seconds", "curvature_products", "peak_memory_bytes"} <= set(metrics)
    for row in ("dense", "masked only", "SNOWS"):
        assert row in out
    with open(tmp_path / "run" / "layers.csv") as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == 22
    assert {"name", "shape", "sparsity", "loss_before", "loss_after", "cg_iterations", "seconds"} <= set(layers[0])
    for layer in layers:
        assert float(layer["loss_after"]) <= float(layer["loss_before"])
        assert float(layer["loss_after_2"]) <= float(layer["loss_before_2"])  # a sweep on the way, one at the target
        assert 2 <= int(layer["cg_iterations"]) <= 6  # at most two in each, and in the joint step

    model, masks = run_folder.load(tmp_path / "run", ResNet(20, 10, channels=1))
    zeros = sum((p == 0).sum().item() for p in model.parameters())
    assert zeros / sum(p.numel() for p in model.parameters()) == metrics["sparsity"]
    for name, mask in masks.items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()
    arguments = json.loads((tmp_path / "run" / "args.json").read_text())
    assert arguments["target_sparsity"] == 0.8
    assert len(set(json.loads((tmp_path / "run" / "calibration.json").read_text())["indices"])) == 64


def test_nm_runs_every_algorithm_and_seed_from_the_scripts_own_folder(small, tmp_path):
    flags = ["--NM_N", 1, "--NM_M", 4, "--algo", "MP", "MP+", "SNOWS", "--seed", 0, 1, "--out_dir", tmp_path / "runs"]
    flags += ["--schedule", 0, "--joint_steps", 0, "--min_samples", 0, "--skip", "layer1.*", "layer3.*"]
    out = shell("CNN_pruning/prune_NM.py", *cifar_flags(small), *flags, cwd=ROOT / "CNN_pruning")
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert folders == sorted(f"{algo}-seed{seed}" for algo in ("MP", "MP+", "SNOWS") for seed in (0, 1))
    assert "conv1: 3 inputs are not a multiple of 4" in out
    states = {name: safetensors.torch.load_file(tmp_path / "runs" / name / "model.safetensors") for name in folders}
    for state in states.values():
        groups = state["layer2.0.conv1.weight"].movedim(1, -1).unflatten(-1, (-1, 4))
        assert ((groups != 0).sum(-1) == 1).all()
    assert not torch.equal(*(states[f"SNOWS-seed{seed}"]["layer2.0.conv1.weight"] for seed in (0, 1)))
    assert not torch.equal(states["SNOWS-seed0"]["fc.weight"], states["MP-seed0"]["fc.weight"])


def test_masks_of_another_tool_are_solved_through_the_script(script, small, tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = ResNet(20, 10)
    masks = {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in model.named_parameters() if p.ndim > 1}
    torch.save(masks, tmp_path / "masks.pt")
    flags = [*cifar_flags(small), "--schedule", 0, "--masks", tmp_path / "masks.pt"]
    out, _ = script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "run")
    assert "pattern masks masks" in out
    state = safetensors.torch.load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())
    _, err = script("CNN_pruning/prune_NM.py", *flags, code=2)
    assert "does not keep to 2:4 in conv1" in err


def test_zeros_of_a_sparse_checkpoint_stay_zeros(script, small, tmp_path):
    state = torch.load(small / "resnet20.pt")
    state["fc.weight"][:, :4] = 0  # a group of 2:4 in each row
    torch.save(state, tmp_path / "sparse.pt")
    flags = [*cifar_flags(small), "--checkpoint", tmp_path / "sparse.pt", "--schedule", 0, "--skip", "conv1", "layer*"]
    flags += ["--min_samples", 0]
    for keep, told in (("True", "stay zero (--keep_zeros)"), ("False", "may come back (--keep_zeros)")):
        run = tmp_path / keep
        captured = script("CNN_pruning/prune_NM.py", *flags, "--keep_zeros", keep, "--out_dir", run)
        assert "".join(captured).count(f"40 weights are zero already, in 1 of 1 layers, and {told}") == 1
        assert json.loads((run / "args.json").read_text())["keep_zeros"] is (keep == "True")
        weight = safetensors.torch.load_file(run / "model.safetensors")["fc.weight"]
        assert bool((weight[:, :4] == 0).all()) is (keep == "True")
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_methods_layers_and_their_sparsities_are_chosen_by_flags_and_masks_are_handed_on(script, small, tmp_path):
    (tmp_path / "rules.json").write_text(json.dumps({"layer1.*": 0.5, "layer2.0.conv1": "dense"}))
    flags = [*cifar_flags(small), "--schedule", 0, "--joint_steps", 0]
    chosen = ["--mask_alg", "OBS", "--skip", "fc", "layer3.*.conv2", "--layer_sparsity", tmp_path / "rules.json"]
    chosen += ["--target_sparsity", 0.4, "--allocation", "erk", "--export_masks", tmp_path / "masks.safetensors"]
    out, _ = script("CNN_pruning/unstr.py", *flags, *chosen, "--out_dir", tmp_path / "first")
    assert "layer*.*.conv2 (3), fc: not selected" in out
    assert "dense, as its rule asks" in out
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert metrics["mask_alg"] == "OBS"
    masks = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    total = sum(p.numel() for p in ResNet(20, 10).parameters())
    assert sum((~mask).sum() for mask in masks.values()) == round(0.4 * total)
    state = safetensors.torch.load_file(tmp_path / "first" / "model.safetensors")
    assert (~masks["layer1.0.conv1"]).sum() == masks["layer1.0.conv1"].numel() / 2
    assert all((state[f"{name}.weight"][~mask] == 0).all() for name, mask in masks.items())

    flags += ["--masks", tmp_path / "masks.safetensors", "--algo", "SparseGPT"]
    script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "second")
    metrics = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert (metrics["mask_alg"], metrics["algo"]) == ("Custom", "SparseGPT")
    again = safetensors.torch.load_file(tmp_path / "second" / "masks.safetensors")
    assert all(torch.equal(again[name], mask) for name, mask in masks.items())


def test_channels_are_permuted_before_masks_are_chosen(script, tmp_path):
    flags = ["--algo", "MP", "--NM_N", 1, "--out_dir"]
    out, _ = script("VIT_pruning/prune_NM.py", *flags, tmp_path / "permuted", "--permute")
    script("VIT_pruning/prune_NM.py", *flags, tmp_path / "plain")
    assert "permuted the inputs of 12 layers: 1:4 keeps" in out
    metrics, states = [], []
    for run in ("permuted", "plain"):
        metrics.append(json.loads((tmp_path / run / "metrics.json").read_text()))
        states.append(safetensors.torch.load_file(tmp_path / run / "model.safetensors"))
    assert metrics[0]["dense_accuracy"] == metrics[1]["dense_accuracy"]
    for i in range(4):
        one, other = (state[f"blocks.{i}.mlp.fc2.weight"] for state in states)
        assert one.abs().sum() > other.abs().sum()
        assert torch.equal((one != 0).sum(), (other != 0).sum())


def test_masks_that_images_choose_are_measured_for_each_seed(script, small, tmp_path):
    flags = [*cifar_flags(small), "--ngrads", 2, "--mask_alg", "SparseGPT", "--algo", "MP", "--skip", "layer3.*"]
    script("CNN_pruning/prune_NM.py", *flags, "--seed", 0, 1, "--out_dir", tmp_path / "runs")
    masks = [run_folder.load(tmp_path / "runs" / f"MP-seed{seed}", ResNet(20, 10))[1] for seed in (0, 1)]
    assert not all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
    for seed in (0, 1):
        metrics = json.loads((tmp_path / "runs" / f"MP-seed{seed}" / "metrics.json").read_text())
        assert metrics["masked_accuracy"] == metrics["accuracy"]
        for mask in masks[seed].values():
            assert (mask.movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_the_paper_preset_and_every_solver_flag_are_taken(script, small, tmp_path):
    flags = ["--preset", "paper", "--depth_weights", "relative", "--cg_tolerance", "0.1", "--w_warm", "True"]
    flags += ["--allocation", "uniform", "--skip", "layer[12].*", "--target_sparsity", 0.3, "--joint_steps", 0]
    script("CNN_pruning/unstr.py", *cifar_flags(small), *flags, "--out_dir", tmp_path / "run")
    chosen = json.loads((tmp_path / "run" / "metrics.json").read_text())["options"]
    assert (chosen["targets"], chosen["curvature"], chosen["batching"]) == ("same", "hessian", True)
    assert (chosen["depth_weights"], chosen["cg_tolerance"], chosen["w_warm"]) == ("relative", 0.1, True)


def test_the_default_transformer_is_pruned_and_its_layers_are_chosen_by_name(script, tmp_path):
    flags = ["--ngrads", 64, "--batch_size", 64, "--schedule", 0, "--out_dir", tmp_path / "run"]
    out, _ = script("VIT_pruning/prune_NM.py", *FAST, *flags)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["dense_accuracy"] == pytest.approx(94.97, abs=0.4)
    assert metrics["accuracy"] > metrics["masked_accuracy"]
    assert "pruning 16 layers: blocks.*.attn.qkv (4), blocks.*.attn.proj (4), blocks.*.mlp.fc1 (4)" in out
    assert "patch_embed.proj, head: not selected" in out

    flags = ["--layers_to_prune", "out_proj", "head", "--target_sparsity", 0.1, "--schedule", 0]
    flags += ["--joint_steps", 0, "--out_dir", tmp_path / "part"]
    out, _ = script("VIT_pruning/unstr.py", *FAST, *flags)
    masks = safetensors.torch.load_file(tmp_path / "part" / "masks.safetensors")
    assert set(masks) == {"head", *(f"blocks.{i}.attn.proj" for i in range(4))}
    metrics = json.loads((tmp_path / "part" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(0.1, abs=1e-4)

    _, err = script("VIT_pruning/prune_NM.py", "--layers_to_prune", "mlp", "in_prj", code=2)
    assert "--layers_to_prune: no prunable layer is named in_prj; those are patch_embed.proj, blocks.0" in err


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A directory in ImageFolder layout with six images a part."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("folder")
    for part in ("train", "val"):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


def test_a_timm_transformer_with_its_own_transform(script, image_folder, tmp_path):
    flags = ["--arch", "timm/test_vit", "--random_weights", "--dset", image_folder, "--max_CG_iterations", 1]
    flags += ["--schedule", 0, "--joint_steps", 0]
    script("VIT_pruning/prune_NM.py", *FAST, *flags, "--out_dir", tmp_path / "run", "--skip_evaluation")
    with open(tmp_path / "run" / "layers.csv") as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == len(safetensors.torch.load_file(tmp_path / "run" / "masks.safetensors")) > 0
    for layer in layers:
        assert float(layer["loss_after"]) < float(layer["loss_before"])
        assert int(layer["peak_memory_bytes"]) > 0


def test_an_image_folder_and_a_timm_network_with_its_own_transform(script, image_folder, tmp_path):
    flags = ["--arch", "timm/lcnet_035", "--random_weights", "--dset", image_folder, "--max_CG_iterations", 1]
    flags += ["--schedule", 0, "--joint_steps", 0]
    out, _ = script("CNN_pruning/prune_NM.py", *FAST, *flags, "--out_dir", tmp_path / "run", "--test_batch_size", 4)
    assert "depthwise" in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_images"] == 6


def test_files_as_people_have_them_are_taken_through_flags(script, small, tmp_path):
    from PIL import Image

    for place in ("Train/a/0", "Train/b/1", "valid/b/2", "valid/b/3", "valid/.ipynb_checkpoints/4"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8 + int(place[-1]))).save(tmp_path / f"{place}.png")
    (tmp_path / "valid" / "b" / "5.png").write_text("no image")
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    weights = {f"net.{name}": tensor for name, tensor in torch.load(small / "resnet20.pt").items()}
    torch.save({"state_dict": {}, "model": {"fc.weight": torch.ones(3)}, "ema": weights}, tmp_path / "x.pt")
    flags = ["--arch", "resnet20_cifar10", "--checkpoint", tmp_path / "x.pt", "--checkpoint_key", "ema", "--resize", 8]
    flags += ["--dset", tmp_path, "--classes", tmp_path / "classes.txt", "--skip_broken", "--algo", "MP"]
    _, err = script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "run", "--max_layer_sparsity", 0.95)
    assert "5.png cannot be read as an image" in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test_images"] == 2
    assert json.loads((tmp_path / "run" / "args.json").read_text())["resize"] == 8


BAD = {
    "unknown architecture": (["--arch", "resnet_of_mine"], "unknown architecture 'resnet_of_mine'"),
    "a name of the other folder": (["--arch", "vit_digits"], "this script knows resnet"),
    "missing checkpoint": (["--checkpoint", "nowhere.pt"], "no such file: nowhere.pt"),
    "missing dataset": (["--dset", "nowhere"], "dataset 'nowhere' is not one of"),
    "sparsity of 1": (["--target_sparsity", "1"], "outside [0, 1)"),
    "negative sparsity": (["--target_sparsity", "-0.1"], "outside [0, 1)"),
    "sparsity out of reach": (["--target_sparsity", "0.9", "--max_layer_sparsity", "0.5"], "out of reach"),
    "too many images": (["--ngrads", "100000"], "cannot draw 100000 calibration images"),
    "no images": (["--ngrads", "0"], "0 is not between 1"),
    "a mean without std": (["--mean", "0.5"], "--mean and --std go together"),
    "negative K": (["--k_step", "-1"], "k_step must be at least 0"),
    "endless sweeps": (["--sweeps", "1000000000"], "sweeps must be at most 1000"),
    "not a boolean": (["--batching", "maybe"], "neither True nor False"),
    "a pattern that matches nothing": (["--skip", "fc", "fd*"], "--skip: no prunable layer is named fd*; those are"),
    "no file of layer sparsities": (["--layer_sparsity", "nowhere.json"], "cannot read nowhere.json"),
    "two sources of masks": (
        ["--masks", "m.pt", "--mask_alg", "OBS"],
        "leave --mask_alg out",
    ),
    "masks and a share": (
        ["--masks", "m.pt", "--allocation", "erk", "--max_layer_sparsity", "0.9"],
        "leave --max_layer_sparsity and --allocation out",
    ),
    "masks and a target": (["--masks", "m.pt", "--target_sparsity", "0.5"], "leave --target_sparsity out"),
    "a key of no file": (["--checkpoint_key", "ema"], "--checkpoint_key names an entry of the file that --checkpoint"),
    "no file of classes": (["--classes", "nowhere.txt"], "cannot read nowhere.txt (--classes)"),
    "no pixels": (["--resize", "0"], "0 is not between 1"),
    "two sources of weights": (["--checkpoint", "w.pt", "--random_weights"], "exclude each other"),
    "classes of a network that has its own": (["--num_classes", "5"], "--num_classes is for the networks of libraries"),
    "masks of two runs": (["--export_masks", "m.safetensors", "--seed", "0", "1"], "--export_masks is for one run"),
    "no folder for masks": (["--export_masks", "nowhere/m.safetensors"], "there is no folder nowhere"),
    "masks of another kind": (["--export_masks", "m.pt"], "writes .safetensors"),
    "an unknown flag": (["--no_such_flag"], "unrecognized arguments"),
    "a misspelt flag": (["--taget_sparsity", "0.5"], "--taget_sparsity 0.5 (did you mean --target_sparsity?)"),
    "an unknown device": (["--device", "abacus"], "abacus"),
    "a device without numbers": (["--device", "meta"], "cannot use device meta"),
    "a name of two lines": (["--arch", "one\ntwo"], "unknown architecture 'one two'"),
    "no test images at a time": (["--test_batch_size", "0"], "0 is not between 1"),
    "a seed beyond 64 bits": (["--seed", str(10**30)], "is not between 0"),
    "a negative seed": (["--seed", "-1"], "-1 is not between 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_usage_ends_with_one_line_and_code_2(script, case, tmp_path):
    flags, message = BAD[case]
    out, err = script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "run", code=2)
    assert message in err
    assert "dense accuracy" not in out  # it is said before an image is tested
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].count("error:") == 1


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 4), (0, 4), (-1, 4)])
def test_n_that_is_not_below_m_is_refused(script, n, m):
    _, err = script("CNN_pruning/prune_NM.py", "--NM_N", n, "--NM_M", m, code=2)
    assert f"N:M = {n}:{m}" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not json"),
        ("[0.5]", "must hold an object"),
        ("{}", "must hold an object"),
        ('{"fc": 1.5}', "layer sparsity of fc: 1.5 is neither a share"),
        ('{"fd": 0.5}', "no prunable layer is named fd"),
        ('\ufeff{"fd": 0.5}', "no prunable layer is named fd"),  # a byte order mark
        ('{"fc": 0.5, "fc": 0.6}', "fc stands there twice"),
        ('{"fc": ' * 10**6, "one nested without end"),
        ('{"fc": ' + "9" * 5000 + "}", "is not json"),
    ],
)
def test_layer_sparsities_that_do_not_fit_say_why(script, tmp_path, text, message):
    (tmp_path / "rules.json").write_text(text, "utf-8")
    _, err = script("CNN_pruning/unstr.py", "--layer_sparsity", tmp_path / "rules.json", code=2)
    assert message in err
    assert "Traceback" not in err


def damaged(folder, kind):
    """A checkpoint that is wrong in one way."""
    state, path = ResNet(20, 10).state_dict(), folder / f"{kind}.pt"
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "nan":
        state["fc.weight"][0, 0] = float("nan")
        torch.save(state, path)
    elif kind == "other network":
        torch.save(ResNet(32, 100).state_dict(), path)
    elif kind == "code":
        torch.save({"state_dict": nn.ReLU()}, path)
    elif kind == "numbers for names":
        torch.save(dict(enumerate(state.values())), path)
    elif kind == "no tensor":
        torch.save({**state, "fc.weight": "elsewhere"}, path)
    elif kind == "scrambled":  # a pickle of letters that are none
        path.write_bytes(b"\x80\x02X\x04\x00\x00\x00\xff\xfe\xfd\xfcq\x01.")
    else:
        torch.save([1, 2], path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged or no checkpoint"),
        ("nan", "NaN or infinity in fc.weight"),
        ("other network", "unexpected layer1.3.conv1.weight"),
        ("code", "whole pickled network"),
        ("no names", "no state dict"),
        ("numbers for names", "no state dict"),
        ("no tensor", "no state dict"),
        ("scrambled", "damaged or no checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(script, small, tmp_path, kind, message):
    flags = [*cifar_flags(small), "--checkpoint", damaged(tmp_path, kind), "--out_dir", tmp_path / "run"]
    _, err = script("CNN_pruning/unstr.py", *flags, code=2)
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["lacks", "float", "labels", "text", "two colours", "no class"])
def test_an_npz_of_the_wrong_form_says_why(script, small, tmp_path, kind):
    arrays = dict(np.load(small / "images.npz"))
    if kind == "lacks":
        del arrays["x_test"]
    elif kind == "float":
        arrays["x_train"] = arrays["x_train"].astype(float)
    elif kind == "labels":
        arrays["y_train"] = arrays["y_train"][:3]
    elif kind == "two colours":
        arrays["x_test"] = arrays["x_test"][..., :2]
    elif kind == "no class":
        arrays["y_test"] = np.full(8, -1)
    np.savez(tmp_path / "bad.npz", **arrays)
    if kind == "text":
        (tmp_path / "bad.npz").write_text("not an archive")
    _, err = script("CNN_pruning/unstr.py", *cifar_flags(small), "--dset", tmp_path / "bad.npz", code=2)
    expected = {"lacks": "lacks x_test", "float": "must be uint8", "labels": "must be uint8", "text": "cannot be read"}
    expected |= {"two colours": "three colours", "no class": "class numbers"}
    assert expected[kind] in err


def test_a_folder_that_holds_a_run_is_not_written_to(script, small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("precious")
    _, err = script("CNN_pruning/unstr.py", *cifar_flags(small), "--out_dir", tmp_path / "run", code=2)
    assert "not empty" in err
    assert (tmp_path / "run" / "metrics.json").read_text() == "precious"


def test_ctrl_c_saves_the_finished_layers_and_exits_with_130(tmp_path):
    command = [sys.executable, "-u", str(ROOT / "CNN_pruning" / "unstr.py"), "--ngrads", "64"]
    process = subprocess.Popen(
        [*command, "--out_dir", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit "ignore"
    )
    for line in process.stdout:
        if "layer1.0.conv2" in line:
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 130
    assert "layers. The finished layers are saved in" in err
    assert f"--resume {tmp_path / 'run'}" in err
    assert "Traceback" not in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["finished"] is False
    model, masks = run_folder.load(tmp_path / "run", ResNet(20, 10, channels=1))
    assert (model.conv1.weight[~masks["conv1"]] == 0).all()
    assert (model.fc.weight != 0).all()


def test_the_calibration_sample_is_seeded_and_mirrors_only_when_asked(small):
    data = Data(*npz(small / "images.npz", normalised((0.5,) * 3, (0.5,) * 3)))
    images, indices = data.calibration(6, seed=1)
    again, same = data.calibration(6, seed=1)
    assert indices == same != data.calibration(6, seed=2)[1]
    assert torch.equal(images, again)
    assert len(set(indices)) == 6
    assert torch.equal(images[0], data.train[indices[0]][0])
    mirrored, _ = data.calibration(6, seed=1, mirror=True)
    flipped = [torch.equal(m, i.flip(-1)) for m, i in zip(mirrored, images)]
    kept = [torch.equal(m, i) for m, i in zip(mirrored, images)]
    assert any(flipped)
    assert all(f != k for f, k in zip(flipped, kept))


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(files.WriteError, match=r"cannot write .*metrics\.json: .*No space left"):
        files.write_json(tmp_path / "metrics.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_dense_accuracy_far_from_the_stated_one_is_warned_about(capsys):
    from snows.cli.task import warn_if_far

    warn_if_far(88.0, 91.4)
    assert "wrong normalisation" in capsys.readouterr().err
    warn_if_far(91.0, 91.4)
    warn_if_far(10.0, None)
    assert capsys.readouterr().err == ""


def test_a_network_below_its_masks_alone_is_warned_about(capsys):
    from snows.cli.one_run import warn_if_worse

    metrics = {"agreement": 80.0, "masked_agreement": 82.0, "calibration_images": 16}
    warn_if_worse(metrics)
    assert "with the masks alone on 82.0 %: 16 calibration images are too few" in capsys.readouterr().err
    for agreement in (81.5, None):
        warn_if_worse({**metrics, "agreement": agreement})
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_is_refused_before_the_network_is_loaded(script, small, tmp_path):
    (tmp_path / "file").write_text("precious")
    flags = [*cifar_flags(small), "--checkpoint", tmp_path / "missing.pt", "--out_dir", tmp_path / "file" / "run"]
    _, err = script("CNN_pruning/unstr.py", *flags, code=2)
    assert f"nothing can be written into {tmp_path / 'file'}. Choose another --out_dir" in err


def test_the_same_run_asked_for_twice_is_run_once_and_a_full_folder_is_refused_before_the_first(
    script, small, tmp_path
):
    flags = [*cifar_flags(small), "--skip_evaluation", "--algo", "MP", "MP", "--seed", 0, 1, 1]
    script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "runs")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"MP-seed0", "MP-seed1"}
    (tmp_path / "runs" / "MP-seed0").rename(tmp_path / "aside")
    (tmp_path / "runs" / "MP-seed0").mkdir()
    (tmp_path / "runs" / "MP-seed0" / "notes.txt").write_text("precious")
    _, err = script("CNN_pruning/unstr.py", *flags, "--out_dir", tmp_path / "runs", code=2)
    assert "MP-seed0 exists and is not empty" in err
    assert [path.name for path in (tmp_path / "runs" / "MP-seed0").iterdir()] == ["notes.txt"]


def test_the_same_command_gives_the_same_bits(script, small, tmp_path):
    asked, command = torch.are_deterministic_algorithms_enabled, [*cifar_flags(small), "--schedule", 1]
    command += ["--skip", "layer[12].*", "--target_sparsity", 0.5]
    try:
        for name, flags in (("one", []), ("two", ["--deterministic"])):
            script("CNN_pruning/unstr.py", *command, *flags, "--out_dir", tmp_path / name)
            assert asked() == (name == "two")
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_images_that_the_network_cannot_take_are_refused(script, small, tmp_path):
    _, err = script("CNN_pruning/unstr.py", "--dset", small / "images.npz", "--out_dir", tmp_path / "run", code=2)
    assert "images.npz do not fit resnet20_digits" in err
