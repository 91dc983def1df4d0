"""Images in an .npz: with labels and without, and what is refused."""

import numpy as np
import pytest
import torch

from snows import UsageError
from snows.zoo.images import load, normalised, npz

TRANSFORM = normalised((0.0,), (1.0,))


def images(count, *more):
    return np.arange(count, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2).reshape(count, 4, 4, *more)


def saved(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def test_images_alone_have_no_labels(tmp_path):
    train, test = npz(saved(tmp_path, x_train=images(3), x_test=images(2)), TRANSFORM)
    assert (len(train), len(test)) == (3, 2)
    assert [label for _, label in test] == [-1, -1]


@pytest.mark.parametrize("name", ["x_train", "images"])
def test_a_single_array_is_split(tmp_path, name):
    train, test = npz(saved(tmp_path, **{name: images(7)}), TRANSFORM)
    values = [sorted(round(255 * image.max().item()) for image, _ in part) for part in (train, test)]
    assert [len(part) for part in values] == [3, 4]
    assert sorted(value for part in values for value in part) == list(range(7))


def test_one_image_with_labels_in_a_column_is_taken_and_the_ending_in_capitals(tmp_path):
    label = np.array([[3]])
    path = saved(tmp_path, x_train=images(1), y_train=label, x_test=images(1), y_test=label)
    data = load(str(path.rename(tmp_path / "x.NPZ")), TRANSFORM, tmp_path)
    assert data.test[0][1] == 3
    assert data.test[0][0].shape == torch.Size((1, 4, 4))


def test_labels_beyond_64_bits_and_two_kinds_of_images_are_refused(tmp_path):
    labels = np.array([0, 1])
    large = np.array([0, 2**63], np.uint64)
    with pytest.raises(UsageError, match="y_test must hold class numbers from 0 on, as integers of 64 bits"):
        npz(saved(tmp_path, x_train=images(2), y_train=labels, x_test=images(2), y_test=large), TRANSFORM)
    colour = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(UsageError, match="must both be grey or both in colour"):
        npz(saved(tmp_path, x_train=images(2, 1), y_train=labels, x_test=colour, y_test=labels), TRANSFORM)


def test_labels_of_either_part_may_be_missing(tmp_path):
    labels = np.array([0, 1])
    train, test = npz(saved(tmp_path, x_train=images(2), x_test=images(2), y_test=labels), TRANSFORM)
    assert [[label for _, label in part] for part in (train, test)] == [[-1, -1], [0, 1]]
    train, test = npz(saved(tmp_path, x_train=images(2), y_train=labels, x_test=images(2)), TRANSFORM)
    assert [[label for _, label in part] for part in (train, test)] == [[0, 1], [-1, -1]]
    with pytest.raises(UsageError, match="lacks x_test, y_test; it must hold x_train, y_train"):
        npz(saved(tmp_path, x_train=images(2), y_train=labels), TRANSFORM)


def test_arrays_of_other_names_are_refused_not_taken_for_images_alone(tmp_path):
    """As MedMNIST names them: the first alone would be half of the training images, tested on the other half."""
    file = saved(tmp_path, train_images=images(4), test_images=images(4), train_labels=np.arange(4))
    with pytest.raises(UsageError, match="holds train_images, test_images, train_labels; it must hold x_train, "):
        npz(file, TRANSFORM)
