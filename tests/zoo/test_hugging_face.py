"""Networks of the package transformers: taken from their folders, pruned, and written as folders again."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import snows
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.exports import export
from snows.errors import SnowsError, UsageError
from snows.zoo.classifiers import from_library

SMALL = dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=10)
STAGES = dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=10)
FAMILIES = {
    "ViT": transformers.ViTConfig(**SMALL, intermediate_size=16),
    "Dinov2": transformers.Dinov2Config(**SMALL),
    "ResNet": transformers.ResNetConfig(**STAGES, embedding_size=8, layer_type="basic"),
    "ConvNext": transformers.ConvNextConfig(**STAGES),
    "Swin": transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=10
    ),
    "Levit": transformers.LevitConfig(
        architectures=["LevitForImageClassification"],
        image_size=32,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        num_labels=10,
    ),
}


def made(family):
    torch.manual_seed(0)
    return transformers.AutoModelForImageClassification.from_config(FAMILIES[family]).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT as save_pretrained writes it, with what becomes of its images."""
    place = tmp_path_factory.mktemp("hub") / "vit"
    made("ViT").save_pretrained(place)
    size, mean = {"height": 32, "width": 32}, [0.1, 0.2, 0.3]
    transformers.ViTImageProcessor(size=size, image_mean=mean, image_std=[0.5, 0.6, 0.7]).save_pretrained(place)
    return place


@pytest.mark.parametrize("family", FAMILIES)
def test_their_networks_are_pruned_as_they_are(family):
    images = torch.randn(8, 3, 32, 32)
    options = snows.Options(schedule=0, joint_steps=1, min_samples=0.0)
    pruned = snows.prune(made(family), images, snows.NM(2, 4), options)
    assert not pruned.problems
    assert set(pruned.masks) == {name for name, weight in weights(pruned.model) if weight.shape[1] % 4 == 0}
    assert type(pruned.model(images)) is type(made(family)(images))
    assert pruned.layers[-1].loss_after < pruned.layers[-1].loss_before


def weights(model):
    kinds = torch.nn.Conv2d, torch.nn.Linear
    return [(name, module.weight) for name, module in model.named_modules() if isinstance(module, kinds)]


def test_arch_takes_their_folders(folder):
    classifier = from_library(f"transformers:{folder}", pretrained=True)
    assert all(map(torch.equal, classifier.model.parameters(), made("ViT").parameters()))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    scaled = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt", do_normalize=False)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    torch.testing.assert_close(classifier.transform(image), (scaled["pixel_values"][0] - mean) / std)
    other = classifier.adapted([0, 0, 0], [1, 1, 1], 8).transform(image)  # of another normalisation, and scaled before
    assert other.shape == (3, 32, 32)
    assert other.min() >= 0
    torch.manual_seed(1)
    random = from_library(f"transformers:{folder}", pretrained=False, num_classes=5).model
    assert random.classifier.out_features == 5
    assert not torch.equal(random.vit.layers[0].mlp.fc1.weight, classifier.model.vit.layers[0].mlp.fc1.weight)


def test_a_network_is_written_as_a_folder_of_theirs(folder, tmp_path, caplog):
    classifier = from_library(f"transformers:{folder}", pretrained=True)
    images = torch.randn(3, 3, 32, 32)
    pruned = snows.prune(classifier.model, images, snows.NM(2, 4), algo="MP")
    subject = Deployable(pruned.model, pruned.masks, lambda: [(images, torch.tensor([0, 1, 2]))], lambda: images)
    out = tmp_path / "transformers"
    assert export(subject, "transformers", out).largest_difference == 0
    again = from_library(f"transformers:{out}", pretrained=True)
    assert all(map(torch.equal, again.model.parameters(), pruned.model.parameters()))
    assert again.transform.processor.image_mean == (0.1, 0.2, 0.3)
    assert "library_name: transformers" in (out / "README.md").read_text()
    assert "says nothing" not in caplog.text
    subject.model.name_or_path = str(tmp_path / "gone")
    export(subject, "transformers", out, ExportOptions(half=True))
    assert "transformers says nothing of what becomes of images: nor does '" in caplog.text
    assert load_file(out / "model.safetensors")["classifier.weight"].dtype == torch.float16


def test_others_networks_are_refused(deployable_of_ours, tmp_path):
    with pytest.raises(UsageError, match=r"only networks of the package transformers .*, and this Linear is none"):
        export(deployable_of_ours, "transformers", tmp_path / "transformers")


@pytest.fixture
def deployable_of_ours():
    model, images = torch.nn.Linear(4, 3), torch.randn(2, 4)
    return Deployable(model, {}, lambda: [(images, torch.tensor([0, 1]))], lambda: images)


def test_weights_that_lack_a_part_are_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack classifier\.weight, which would be random"):
        from_library(f"transformers:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("place", ["", "nowhere", "./no/where", "a/b/c"])
def test_what_is_no_place_is_refused(place):
    with pytest.raises(UsageError, match="give a folder that exists, or OWNER/NAME"):
        from_library(f"transformers:{place}", pretrained=True)


def test_a_folder_of_something_else_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SnowsError, match=r"cannot get transformers:.*Bert.* Give a folder that has its files"):
        from_library(f"transformers:{tmp_path}", pretrained=False)


def test_without_the_package_it_is_named(monkeypatch, folder):
    monkeypatch.setattr("snows.zoo.hugging_face.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package transformers: pip install transformers"):
        from_library(f"transformers:{folder}", pretrained=True)


def test_the_scripts_prune_and_write_them(folder, small, tmp_path, script):
    run = tmp_path / "run"
    solved = ["--schedule", 0, "--joint_steps", 0, "--min_samples", 0, "--ngrads", 8]
    images = ["--dset", small / "images.npz", "--arch", f"transformers:{folder}"]
    script("VIT_pruning/prune_NM.py", *images, *solved, "--export", "transformers", "packed", "--out_dir", run)
    parts = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    layers = json.loads((run / "layers.json").read_text())
    assert {layer["name"] for layer in layers} == {f"vit.layers.0.{part}" for part in parts}
    exported = json.loads((run / "export.json").read_text())
    assert exported["transformers"]["zeros_found"] == exported["transformers"]["zeros_asked"] > 0
