"""What a run says of its machine and its command."""

import pytest

from snows.cli.environment import without_folders


@pytest.mark.parametrize(
    ("arg", "recorded"),
    [
        ("/home/me/images.npz", "images.npz"),
        ("/home/me/images/", "images/"),
        ("transformers:/home/me/vit", "transformers:vit"),
        ("--out_dir=/home/me/run", "--out_dir=run"),
        ("transformers:google/vit", "transformers:google/vit"),
        ("timm/resnet50", "timm/resnet50"),
        ("layers/*.weight", "layers/*.weight"),
        ("tcp://host:29500", "tcp://host:29500"),
        ("/", "/"),
    ],
)
def test_the_command_is_recorded_without_folders_of_this_machine(arg, recorded):
    assert without_folders(arg) == recorded
