"""Depths that do not count: of few samples per weight, where of a layer the bias is solved, or of next to no energy."""

import math

import pytest
import torch
from helpers import ROOT, randomise
from torch import nn
from utils import KNOWN

import snows
from snows.calibration.streams import Streams
from snows.network.network import Network
from snows.solve.objective import reconstruction
from snows.zoo.evaluate import score
from snows.zoo.registry import load_classifier, load_data

ONE_PASS = snows.Options(schedule=0, joint_steps=0)
CLASSES = 40
FEW = 60  # images: fewer than 2.5 for each of the 32 weights that survive in an output row


def classifier(inputs=64):
    """A network whose only layer sees one sample an image."""
    return randomise(nn.Sequential(nn.Flatten(), nn.Linear(inputs, CLASSES)))


def images(count, seed, inputs=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 1, inputs, generator=generator, dtype=torch.float64).relu()


def pruned(model, count, options=ONE_PASS, sparsity=0.5, **how):
    return snows.prune(model, images(count, 1), snows.Unstructured(sparsity, 0.99), options, **how)


@pytest.mark.parametrize("joint_steps", [0, 2])
@pytest.mark.parametrize("algo", ["SNOWS", "MP+", "SparseGPT"])
def test_a_classifier_of_few_images_keeps_its_masked_weights(algo, joint_steps):
    model = classifier()
    found = pruned(model, FEW, ONE_PASS.but(joint_steps=joint_steps), algo=algo)
    assert torch.equal(found.model[1].weight, model[1].weight * found.masks["1"])


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.Unstructured(0.5)])
@pytest.mark.parametrize("mask_alg", ["MP", "ALPS", "SparseGPT"])
@pytest.mark.parametrize("algo", ["SNOWS", "MP+"])
def test_no_place_of_its_mask_is_given_to_a_zero_of_an_earlier_pass(algo, mask_alg, pattern):
    """The fault: masks chosen for weights that least squares would move kept zeros, which nothing moved."""
    found = snows.prune(classifier(), images(FEW, 1), pattern, ONE_PASS.but(schedule=2), mask_alg=mask_alg, algo=algo)
    assert found.masks["1"].sum() >= 0.49 * 64 * CLASSES
    assert (found.model[1].weight != 0).equal(found.masks["1"])


def test_its_bias_takes_up_what_the_mean_image_loses():
    model, some = classifier(), images(FEW, 1)
    found = pruned(model, FEW, ONE_PASS.but(cg_tolerance=1e-8, max_CG_iterations=50, damping=0.0, newton_steps=3))
    assert not torch.equal(found.model[1].bias, model[1].bias)
    torch.testing.assert_close(found.model(some).mean(0), model(some).mean(0), rtol=1e-4, atol=1e-4)


def test_layers_of_few_samples_are_named(caplog):
    caplog.set_level("INFO", "snows")
    pruned(classifier(), FEW)
    pruned(classifier(), FEW, ONE_PASS.but(min_samples=0.0))
    said = [record.getMessage() for record in caplog.records if "min_samples" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("of 1 layer the images give fewer than 2.5 numbers")


@pytest.mark.parametrize("algo", ["SNOWS", "MP+", "SparseGPT"])
def test_where_all_layers_are_of_few_samples_it_is_a_warning(algo, caplog):
    convolutions = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    mixed = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), *convolutions, nn.Flatten(), nn.Linear(144, 3))
    for model, few in ((classifier(), True), (randomise(mixed), False)):
        caplog.clear()
        pruned(model, FEW, algo=algo)
        assert any("min_samples" in each.getMessage() for each in caplog.records if each.levelname == "WARNING") == few


@pytest.mark.parametrize("min_samples", [0.0, 2.5])
def test_what_is_few_is_a_matter_of_the_option(min_samples):
    model, options = classifier(), ONE_PASS.but(min_samples=min_samples)
    weights = 0.5 * 64 * CLASSES
    enough = int(2.5 * weights / CLASSES) + 40  # of the parameters, biases among them, half are removed
    few, many = pruned(model, FEW, options), pruned(model, enough, options)
    assert torch.equal(few.model[1].weight, model[1].weight * few.masks["1"]) == (min_samples > 0)
    assert not torch.equal(many.model[1].weight, model[1].weight * many.masks["1"])


def test_a_classifier_of_few_images_still_knows_classes_that_they_do_not_show():
    """The fault: least squares taught the rows of such classes to be low, held-out images or not."""
    model = classifier()
    with torch.no_grad():  # a class has a prototype, and its row answers to it
        prototypes = images(CLASSES, 7).flatten(1)
        model[1].weight.copy_(prototypes - prototypes.mean(0))
        model[1].bias.copy_(-(model[1].weight * prototypes).sum(1) / 2)

    def shown(classes, count, seed):
        noise = images(count * len(classes), seed).flatten(1)
        return (prototypes[classes].repeat(count, 1) + 0.6 * noise).view(-1, 1, 1, 64)

    half = torch.arange(CLASSES // 2)
    calibration, unseen = shown(half, 1, 8), shown(half + CLASSES // 2, 50, 9)
    wanted = model(unseen).argmax(1)

    def agreement(options):
        found = snows.prune(model, calibration, snows.Unstructured(0.7, 0.99), options)
        return (found.model(unseen).argmax(1) == wanted).double().mean().item()

    kept, solved = agreement(ONE_PASS), agreement(ONE_PASS.but(min_samples=0.0, cg_tolerance=1e-6))
    assert kept > 0.9 > solved + 0.2


def test_layers_of_many_samples_are_solved_as_before():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten()))
    some = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = snows.NM(1, 2, {"0": "dense"})
    found = snows.prune(model, some, pattern, ONE_PASS)
    without = snows.prune(model, some, pattern, ONE_PASS.but(min_samples=0.0))
    assert torch.equal(found.model[2].weight, without.model[2].weight)
    assert not torch.equal(found.model[2].weight, model[2].weight * found.masks["2"])


@pytest.mark.parametrize("count", [3, 10])
def test_depths_of_few_samples_do_not_count(count):
    """The logits of few images, which the convolution before them would fit by heart."""
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)]
    network, options = Network(randomise(nn.Sequential(*body))), ONE_PASS.but(min_samples=10.0)
    some = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    streams, layer = Streams(network, [some], "cpu", options), network.layers[0]
    mask = torch.ones(layer.shape, dtype=torch.bool)
    features = [8 * 36, 8 * 36, CLASSES]  # of the convolution, the ReLU, the classifier
    wanted = [numbers * count >= 10 * mask.numel() for numbers in features]
    assert streams.samples.counted(layer, mask, options) == wanted
    assert any(wanted)
    assert not all(wanted)
    objective = reconstruction([layer], streams.sparse, streams.dense, options, counted=wanted)
    every = reconstruction([layer], streams.sparse, streams.dense, options)
    assert [c > 0 for c in objective.coefficients] == wanted
    assert objective.coefficients == [c * counts for c, counts in zip(every.coefficients, wanted)]
    assert objective.on([0]).coefficients == objective.coefficients


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-25, 1e-14, 1e-6])
def test_features_that_vanish_are_left_to_those_that_do_not(scale):
    """As behind many layers of random weights: what is divided by their squares would be no number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    with torch.no_grad():
        for small in (model[2].weight, model[2].bias, model[4].bias):
            small *= scale
    options = snows.Options(schedule=0, joint_steps=1, min_samples=0.0)
    pruned = snows.prune(model, torch.rand(16, 3, 8, 8), snows.Unstructured(0.5), options)
    assert not pruned.problems
    assert all(math.isfinite(record.loss_after) and record.loss_after <= record.loss_before for record in pruned.layers)
    assert pruned.layers[0].loss_after < pruned.layers[0].loss_before


def test_joint_steps_on_few_images_help_on_those_that_they_have_not_seen():
    """So none need be held out to say when the steps should end."""
    classifier = load_classifier("resnet20_digits", KNOWN)
    data = load_data("resnet20_digits", classifier, "digits", ROOT)
    few, unseen = data.calibration(12, 0)[0], list(data.test_batches(200))[:1]
    _, logits = score(classifier.model, unseen)

    def error(joint_steps):
        found = snows.prune(classifier.model, few, snows.NM(1, 4), ONE_PASS.but(joint_steps=joint_steps))
        return score(found.model, unseen, dense=logits)[0].logit_error

    assert error(2) < 0.9 * error(0)
