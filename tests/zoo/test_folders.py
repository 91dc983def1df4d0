"""Folders of images as people have them: their parts, their classes, and files that are not as they should be."""

import logging
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from snows import UsageError
from snows.zoo.classifiers import Classifier, with_resize
from snows.zoo.folders import read_classes
from snows.zoo.images import load, normalised
from snows.zoo.pictures import read_picture
from snows.zoo.registry import load_classifier, load_data

TRANSFORM = normalised((0.0,) * 3, (1.0,) * 3)  # which leaves values from 0 to 1


def picture(path, value=0, size=(6, 4)):
    """A file in one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def folder_of(root, *names, images=2):
    """Images in a folder for each name, whose values count them."""
    for number, name in enumerate(names):
        for i in range(images):
            picture(root / name / f"{i}.png", value=10 * number + i)
    return root


class Pooled(nn.Module):
    """A network that takes every size, with so many outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.fc = nn.Linear(3, outputs)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Fixed(nn.Module):
    """A network for images of 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 2)

    def forward(self, x):
        return self.fc(x.flatten(1))


def read(root, outputs=5, model=None, resize=None, **flags):
    classifier = Classifier(model or Pooled(outputs), with_resize(TRANSFORM, resize))
    return load_data("mine", classifier, str(root), root, **flags)


def labels(data):
    return [label for _, label in data.test]


def values(dataset):
    return [round(255 * image[0, 0, 0].item()) for image, _ in dataset]


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test", "Val", "TEST"])
@pytest.mark.parametrize("other", ["train", "Train"])
def test_the_parts_are_known_by_their_usual_names(tmp_path, part, other):
    folder_of(tmp_path, f"{other}/a", f"{other}/b", f"{part}/a", f"{part}/b")
    data = read(tmp_path)
    assert values(data.train) == [0, 1, 10, 11]
    assert values(data.test) == [20, 21, 30, 31]
    assert labels(data) == [0, 0, 1, 1]


def test_images_and_labels_stand_in_torchvisions_order(tmp_path):
    places = ["val/B/2", "val/b/x/10", "val/b/x/9", "val/b/1", "val/b-c/x/y/1"]
    for place in [*places, "train/b/0", "train/b-c/0", "train/B/0"]:
        picture(tmp_path / f"{place}.PNG")
    picture(tmp_path / "val" / "b" / "3.jpeg")
    data, expected = read(tmp_path), torchvision.datasets.ImageFolder(str(tmp_path / "val"))
    assert list(zip(data.test.part.paths, data.test.labels)) == expected.samples


def test_val_is_taken_before_test(tmp_path):
    folder_of(tmp_path, "test/a", "train/a", "val/a")
    assert values(read(tmp_path).test) == [20, 21]


@pytest.mark.parametrize("layout", ["val", "classes", "flat"])
def test_one_part_alone_is_split_the_same_way_each_time_and_that_is_said(tmp_path, caplog, layout):
    caplog.set_level(logging.INFO, "snows")
    names = {"val": ["val/a", "val/b"], "classes": ["a", "b"], "flat": ["."]}[layout]
    folder_of(tmp_path, *names, images=6)
    data = read(tmp_path)
    train, test = values(data.train), values(data.test)
    assert len(train) == len(test) == 3 * len(names)
    assert not set(train) & set(test)
    assert "has one part" in caplog.text
    assert (
        f"{len(test)} of its images, drawn at random with seed 0, calibrate, the other {len(test)} test" in caplog.text
    )
    assert values(read(tmp_path).test) == test
    assert labels(data) == [-1 if layout == "flat" else value // 10 for value in test]


def test_hidden_folders_and_files_are_no_classes(tmp_path):
    folder_of(
        tmp_path,
        *(f"{part}/{name}" for part in ("train", "val") for name in (".ipynb_checkpoints", "__MACOSX", "a", "b")),
    )
    picture(tmp_path / "val" / "b" / "._1.png")
    assert labels(read(tmp_path)) == [0, 0, 1, 1]


def test_test_images_of_classes_without_training_images_are_an_error(tmp_path):
    folder_of(tmp_path, "train/a", "train/c", "val/b", "val/c")
    with pytest.raises(UsageError, match=r"val has class folders that \S*train lacks: b\. Give `classes`"):
        read(tmp_path)
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    assert labels(read(tmp_path, classes=tmp_path / "classes.txt")) == [1, 1, 0, 0]
    (tmp_path / "classes.txt").write_text("c\na\n")
    with pytest.raises(UsageError, match="does not list the folders b"):
        read(tmp_path, classes=tmp_path / "classes.txt")


def test_a_class_of_training_images_alone_keeps_its_number(tmp_path):
    folder_of(tmp_path, "train/a", "train/b", "val/b")
    assert labels(read(tmp_path)) == [1, 1]


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("a\nb\na\n", "names a twice"), (b"\xff\xfe", "cannot read")]
)
def test_a_file_of_classes_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_classes(path)


def test_folders_of_imagenet_are_known_to_a_network_with_its_outputs(tmp_path, caplog):
    caplog.set_level(logging.INFO, "snows")
    folder_of(tmp_path, "train/n01440764", "val/n02102040", "val/n01440764")
    names = timm.data.ImageNetInfo().label_names()
    assert labels(read(tmp_path, outputs=1000)) == [0, 0, 217, 217]
    assert names[217] == "n02102040"
    assert names == sorted(names)
    assert "2 of ImageNet's classes" in caplog.text
    with pytest.raises(UsageError, match="lacks: n02102040"):
        read(tmp_path, outputs=10)


def test_class_folders_are_compared_with_the_networks_outputs(tmp_path, caplog):
    for part in ("train", "val"):
        folder_of(tmp_path / part, "a", "b", "c")
    with pytest.raises(UsageError, match=r"there are 3 classes, and the network has 2 outputs"):
        read(tmp_path, outputs=2)
    read(tmp_path, outputs=3)
    assert not caplog.text
    read(tmp_path, outputs=9)
    assert "3 classes are taken for the first of the network's 9 outputs" in caplog.text


@pytest.mark.parametrize(
    ("outputs", "told"), [(2, "there are 3 classes"), (3, ""), (4, "the first of the network's 4")]
)
def test_listed_classes_are_compared_with_the_networks_outputs(tmp_path, caplog, outputs, told):
    folder_of(tmp_path, "train/a", "val/a")
    (tmp_path / "classes.txt").write_text("b\na\nc\n")
    if outputs == 2:
        with pytest.raises(UsageError, match=told):
            read(tmp_path, outputs=outputs, classes=tmp_path / "classes.txt")
        return
    assert labels(read(tmp_path, outputs=outputs, classes=tmp_path / "classes.txt")) == [1, 1]
    assert bool(caplog.text) == bool(told)
    assert told in caplog.text


def test_classes_are_for_folders(tmp_path):
    (tmp_path / "classes.txt").write_text("a\n")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=images, x_test=images)
    with pytest.raises(UsageError, match="`classes` is for folders"):
        read(tmp_path / "x.npz", classes=tmp_path / "classes.txt")


def test_no_images_and_one_image_are_told(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match="train holds no images"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="neither train/ nor val/"):
            load("imagenet", TRANSFORM, place)
    picture(tmp_path / "one" / "x.png")
    with pytest.raises(UsageError, match="cannot both calibrate and test"):
        read(tmp_path / "one")


SIXTEEN = np.array([[0, 257 * 100, 65535]], np.uint16)
FLOATS = [np.array([row], np.float32) for row in ([0, 0.392, 1], [0, 100, 255], [0, 257 * 100, 65535])]


@pytest.mark.parametrize(("ending", "pixels"), [("png", SIXTEEN), *(("tif", each) for each in (SIXTEEN, *FLOATS))])
def test_grey_values_of_more_than_eight_bits_are_scaled(tmp_path, ending, pixels):
    Image.fromarray(pixels).save(tmp_path / f"x.{ending}")
    assert np.asarray(read_picture(str(tmp_path / f"x.{ending}")))[0].tolist() == [
        [value] * 3 for value in (0, 100, 255)
    ]


def test_grey_values_out_of_every_range_are_told(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UsageError, match=r"x\.tif cannot be read as an image: grey values from nan"):
        read_picture(str(tmp_path / "x.tif"))


def test_eight_bits_that_are_stored_in_sixteen_are_not_black(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_picture(str(tmp_path / "x.png")))[0].tolist() == [[value] * 3 for value in (0, 100, 255)]


def test_a_network_of_one_channel_gets_images_in_grey(tmp_path):
    folder_of(tmp_path, "train/a", "val/a")
    model = nn.Sequential(nn.Conv2d(1, 3, 1), Pooled(2))
    data = load_data("mine", Classifier(model, normalised((0.0,), (1.0,))), str(tmp_path), tmp_path)
    assert {tuple(image.shape) for part in (data.train, data.test) for image, _ in part} == {(1, 4, 6)}
    with pytest.raises(UsageError, match=r"0\.png becomes 6 x 4 pixels of 3 channels"):
        read(tmp_path, model=nn.Sequential(nn.Conv2d(2, 3, 1), Pooled(2)))


class Returning(nn.Module):
    """A network that returns something of its logits."""

    def __init__(self, function):
        super().__init__()
        self.inner, self.function = Pooled(2), function

    def forward(self, x):
        return self.function(self.inner(x))


class Named(Returning):
    def forward(self, *, images):
        return self.inner(images)


RETURNED = {
    "a tensor \\(1,\\)": Returning(lambda logits: logits[:, 0]),
    "a tensor \\(1, 2, 1, 1\\)": Returning(lambda logits: logits[..., None, None]),
    "a dict": Returning(lambda logits: {"out": logits}),
    "a tuple": Returning(lambda logits: (logits, logits)),
    "positional argument": Named(None),
}


@pytest.mark.parametrize("told", RETURNED)
def test_a_network_that_does_not_return_logits_is_told_in_one_line(tmp_path, told):
    folder_of(tmp_path, "train/a", "val/a")
    with pytest.raises(UsageError, match=told):
        read(tmp_path, model=RETURNED[told])


def test_an_entry_of_known_must_be_a_classifier():
    with pytest.raises(UsageError, match="the entry mine of KNOWN makes a Pooled, not a Classifier"):
        load_classifier("mine", {"mine": lambda pretrained: Pooled(2)})


def test_an_image_is_turned_as_its_metadata_say(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: a quarter to the right
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(str(tmp_path / "x.jpg")).size == (4, 6)
    image.save(tmp_path / "y.jpg", exif=b"Exif\0\0" + b"nonsense")
    assert read_picture(str(tmp_path / "y.jpg")).size == (6, 4)


LEFT = [10, 11, 12, 13, 14]  # of the test images below, those that can be read


def broken(path, kind):
    """An image file that cannot be read."""
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "bomb":  # a header alone says 50,000 x 50,000
        size = (50_000).to_bytes(4, "little")
        path.write_bytes(b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + size + size + b"\1\0\x18\0" + bytes(24))
    else:
        path.write_text("no image")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "bomb", "text"])
def test_an_image_that_cannot_be_read_is_named_in_one_line_or_left_out(tmp_path, caplog, kind, workers):
    folder_of(tmp_path, "train/a", "val/a", images=5)
    for place in ("train/a/3.jpg", "val/a/4.jpg"):
        broken(tmp_path / place, kind)
    data = read(tmp_path, num_workers=workers)
    for read_all in (lambda: data.calibration(6, 0), lambda: list(data.test_batches(2))):
        with pytest.raises(UsageError) as error:
            read_all()
        assert re.fullmatch(r"\S+[34]\.jpg cannot be read as an image: [^\n]*`skip_broken`\.", str(error.value))
    data = read(tmp_path, num_workers=workers, skip_broken=True)
    images, indices = data.calibration(5, 0)
    assert sorted(indices) == [0, 1, 2, 4, 5]
    assert all(torch.equal(image, data.train[index][0]) for image, index in zip(images, indices))
    assert [round(255 * image[0, 0, 0].item()) for batch, _ in data.test_batches(2) for image in batch] == [
        10,
        11,
        12,
        13,
        14,
    ]
    assert "4.jpg cannot be read as an image" in caplog.text
    with pytest.raises(UsageError, match="only 5 of the 6 calibration images"):
        data.calibration(6, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_several_sizes_are_told_with_what_to_do(tmp_path, workers):
    folder_of(tmp_path, "train/a", "val/a")
    picture(tmp_path / "val" / "a" / "odd.png", size=(9, 5))
    data = read(tmp_path, num_workers=workers)
    with pytest.raises(
        UsageError, match=r"^\S*odd\.png becomes 9 x 5 pixels where others are 6 x 4 pixels, [^\n]*`resize`"
    ) as error:
        list(data.test_batches(2))
    assert len(str(error.value).splitlines()) == 1
    shapes = {tuple(batch.shape[1:]) for batch, _ in read(tmp_path, num_workers=workers, resize=4).test_batches(2)}
    assert shapes == {(3, 4, 4)}


def test_images_larger_than_those_that_a_network_was_trained_on_are_warned_of(tmp_path, caplog):
    folder_of(tmp_path, "train/a", "val/a")
    for side in (6, 4):
        load_data("mine", Classifier(Pooled(2), TRANSFORM, pixels=side), str(tmp_path), tmp_path)
        assert ("`resize` 4 scales it" in caplog.text) == (side == 4)
    assert "0.png becomes 6 x 4 pixels, and the network was trained on 4 x 4" in caplog.text
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 4, 6, 3), np.uint8))
    load_data("mine", Classifier(Pooled(2), TRANSFORM, pixels=4), str(tmp_path / "x.npz"), tmp_path)
    assert (
        "the first image becomes 6 x 4 pixels, and the network was trained on 4 x 4: `resize` 4 scales" in caplog.text
    )


def test_images_too_large_for_a_network_are_told_with_what_to_do(tmp_path):
    folder_of(tmp_path, "train/a", "val/a")
    with pytest.raises(UsageError, match=r"0\.png becomes 6 x 4 pixels of 3 channels; `resize` scales images"):
        read(tmp_path, model=Fixed())
    assert len(read(tmp_path, model=Fixed(), resize=4).test) == 2
