"""Networks of torchvision by name."""

import pytest
import torchvision
from torch import nn

from snows.zoo.classifiers import from_library


@pytest.mark.parametrize("arch", ["vit_h_14", "regnet_y_128gf", "resnet18"])
def test_networks_without_the_usual_weights_have_a_transform_all_the_same(arch, monkeypatch):
    built = {}
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights, **rest: built.update({name: weights}) or nn.Identity()
    )
    assert callable(from_library(arch, pretrained=False).transform)
    from_library(arch, pretrained=True)
    assert built[arch].name == ("IMAGENET1K_V1" if arch == "resnet18" else "IMAGENET1K_SWAG_E2E_V1")
