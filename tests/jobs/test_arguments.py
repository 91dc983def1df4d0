"""What `prune` cannot do anything with is refused in one line, before anything is computed."""

import pytest
import torch
from helpers import TinyCNN, randomise
from torch import nn
from torch.nn.utils import prune as torch_prune

import snows

IMAGES = torch.randn(3, 2, 4, 4)


def half(model):
    return model.to(torch.bfloat16)


def torch_pruned(model):
    torch_prune.l1_unstructured(model.fc, "weight", 0.5)
    return model.train() and forward_once(model)


def forward_once(model):
    model(IMAGES)
    return model


def distributed_within(model):
    """No process group is needed for what is refused by its class."""
    inner = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(inner)
    inner.module = nn.Identity()
    return nn.Sequential(model, inner)


MODELS = {
    "no module": (lambda model: model.forward, "must be a torch.nn.Module, not method"),
    "data parallel": (nn.DataParallel, r"pass model\.module"),
    "distributed within": (distributed_within, r"cannot trace 1 \(DistributedDataParallel\): put .* its \.module"),
    "compiled": (torch.compile, r"pass model\._orig_mod"),
    "scripted": (torch.jit.script, "pass the one it was made from"),
    "lazy": (lambda model: nn.Sequential(model, nn.LazyLinear(2)), "without numbers"),
    "on the meta device": (lambda model: model.to("meta"), "without numbers"),
    "coarse numbers": (half, r"torch\.bfloat16, too coarse to solve in: pass model\.float\(\)"),
    "pruned by torch": (torch_pruned, "cannot be copied: .*make them permanent first"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_wrapped_or_without_numbers_are_refused(kind):
    change, message = MODELS[kind]
    model = change(randomise(TinyCNN()).float())
    with pytest.raises(snows.errors.SnowsError, match=message):
        snows.prune(model, IMAGES, snows.NM(1, 2))


CALIBRATIONS = {
    "a number": (5, "not int"),
    "no batches": ([], "the batches are empty"),
    "whole numbers": (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), "not torch.uint8"),
    "complex numbers": (IMAGES.to(torch.complex64), "not torch.complex64"),
    "several sizes": ([IMAGES, IMAGES[..., :2]], r"of one size, not of \(2, 4, 2\), \(2, 4, 4\)"),
    "other channels": (torch.randn(3, 5, 4, 4), "images of 5x4x4 do not run through the model"),
}


@pytest.mark.parametrize("kind", CALIBRATIONS)
def test_images_that_the_model_cannot_take_are_refused(tiny, kind):
    calibration, message = CALIBRATIONS[kind]
    with pytest.raises(snows.UsageError, match=message):
        snows.prune(tiny, calibration, snows.NM(1, 2))


def test_images_in_other_floats_than_the_weights_are_converted(tiny):
    options = snows.Options(schedule=0, joint_steps=0)
    single, double = (snows.prune(tiny, x, snows.NM(1, 2), options) for x in (IMAGES, IMAGES.double()))
    assert torch.equal(single.model.fc.weight, double.model.fc.weight)


ARGUMENTS = {
    "pattern as text": (["2:4"], {}, r"the pattern must be snows\.Unstructured"),
    "pattern as a pair": ([(2, 4)], {}, r"the pattern must be snows\.Unstructured"),
    "options as a dict": ([snows.NM(1, 2), {"k_step": 2}], {}, r"options must be snows\.Options"),
    "layers as a list": ([snows.NM(1, 2)], {"layers": ["fc"]}, "layers must be a function"),
    "an unknown method": ([snows.NM(1, 2)], {"algo": "magic"}, "algorithm 'magic' is not one of SNOWS, MP"),
    "an unknown device": ([snows.NM(1, 2)], {"device": "abacus"}, "cannot use device abacus"),
    "a list as a mask": ([{"fc": [[1, 0]]}], {}, "masks must be tensors of booleans, or of 0 and 1: fc"),
    "shares as a mask": ([{"fc": torch.rand(3, 4)}], {}, "masks must be tensors of booleans, or of 0 and 1: fc"),
    "no numbers as a mask": ([{"fc": torch.full((3, 4), torch.nan)}], {}, "masks must be tensors of booleans"),
    "no groups": ([snows.NM(3, 5)], {}, "stem, grouped: 2 inputs are not a multiple of 5; gate, fc: 4 inputs are"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_other_arguments_of_the_wrong_kind_are_refused(tiny, kind):
    args, kwargs, message = ARGUMENTS[kind]
    with pytest.raises(snows.UsageError, match=message):
        snows.prune(tiny, IMAGES, *args, **kwargs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: snows.NM("2", 4), "whole numbers, not '2' and 4"),
        (lambda: snows.NM(2.0, 4), r"whole numbers, not 2\.0 and 4"),
        (lambda: snows.Unstructured("0.5"), "a sparsity must be a number, not '0.5'"),
        (lambda: snows.Unstructured(0.5, "0.9"), "a sparsity must be a number, not '0.9'"),
        (lambda: snows.Options(damping=float("inf")), "damping must be a finite number"),
    ],
)
def test_patterns_and_options_of_the_wrong_kind_are_refused(build, message):
    with pytest.raises(snows.UsageError, match=message):
        build()
