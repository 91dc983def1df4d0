"""What is exported: a pruned network with its masks and the images to check it on; and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from snows.errors import SnowsError, TraceError, first_line
from snows.masks.patterns import NM
from snows.network.attention import attention_by_parts
from snows.network.known import weight_name
from snows.network.layers import Masks
from snows.network.logits import logits_of
from snows.network.network import Network, copied
from snows.zoo.evaluate import Batches


@dataclass(frozen=True)
class ExportOptions:
    """The choices that an export leaves.

    half: weights and arithmetic in fp16; images go in and logits come out as float32.
    int8_tolerance: the percent points of accuracy that int8 may lose.
    int8_float: names or patterns of the layers that int8 leaves in float; empty: its first convolutions; "none": none,
        and all else by NNCF's defaults too.
    """

    half: bool = False
    int8_tolerance: float = 1.0
    int8_float: tuple[str, ...] = ()


@contextmanager
def reading_images() -> Iterator[None]:
    """While images are read, an error of the file system is theirs.

    Raises:
        SnowsError: it says so.
    """
    try:
        yield
    except OSError as error:
        why = str(error).strip().splitlines()[-1]  # a loading process puts its traceback above it
        raise SnowsError(f"the images cannot be read: {why}") from error


@dataclass(frozen=True)
class Deployable:
    """A pruned network on the CPU in evaluation mode, with all that its exports need.

    pattern: what each layer is checked against; None: unstructured.
    calibration, test: give the images that int8 is calibrated on, (n, c, h, w), and those that all are compared on.
    card: what the model card says, a line for each.
    """

    model: nn.Module
    masks: Masks
    test: Callable[[], Batches]
    calibration: Callable[[], Tensor]
    pattern: NM | None = None
    card: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def network(self) -> Network:
        """The network, traced."""
        return Network(self.model, example=lambda: self.example)

    @cached_property
    def example(self) -> Tensor:
        """Two test images: with one, torch.export would take the size of a batch for fixed."""
        with reading_images():
            image = next(iter(self.test()))[0][:1]
        return image.repeat(2, 1, 1, 1)  # (2, c, h, w)

    @cached_property
    def folded(self) -> nn.Module:
        """The network with its BatchNorms in the convolutions before them, as far as it can be followed."""
        return folded(self)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights of the pruned layers, by layer, as they are in a model that has the network's names."""
        state = model.state_dict()
        return {name: state[weight_name(name, state)] for name in self.masks}


def folded(deployable: Deployable) -> nn.Module:
    """A copy of the network in which each BatchNorm after a convolution is a part of that."""
    model = copied(deployable.model)
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    try:
        network = deployable.network
    except TraceError:  # a network that was pruned elsewhere: the runtime may fold what this cannot follow
        return model
    for before, after in network.batch_norm_of.items():
        pair = [model.get_submodule(str(node.target)) for node in (before, after) if node.op == "call_module"]
        if len(pair) == 2 and isinstance(pair[1], _BatchNorm) and network.calls[after.target] == 1:
            fold(*pair)
            path, _, name = str(after.target).rpartition(".")
            setattr(model.get_submodule(path), name, what_is_left(pair[1]))
    return model


def fold(convolution: nn.Module, norm: nn.Module) -> None:
    """Put a BatchNorm's scale and shift into a convolution's weight and bias."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
    convolution.weight, convolution.bias = weight, bias


def what_is_left(norm: nn.Module) -> nn.Module:
    """What a folded BatchNorm still does: nothing, or the activation that timm's have in them."""
    return nn.Sequential(*(getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)))


class Half(nn.Module):
    """A network in fp16 that takes float32 images and gives float32 logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copied(network).half()

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images.half())).float()


class LogitsAlone(nn.Module):
    """A network that returns more than its logits, without the rest."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images))


@torch.no_grad()
def with_logits_alone(network: nn.Module, images: Tensor) -> nn.Module:
    """The network itself, if its logits are what it returns."""
    return network if isinstance(network.eval()(images), Tensor) else LogitsAlone(network)


def program(deployable: Deployable, how: ExportOptions) -> torch.export.ExportedProgram:
    """The folded network as torch.export sees it, for batches of any size.

    Raises:
        SnowsError: torch.export cannot follow it, or only for one size of batch.
    """
    model = Half(deployable.folded) if how.half else with_logits_alone(deployable.folded, deployable.example)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), attention_by_parts():
            return torch.export.export(model.eval(), (deployable.example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # of torch.export's many kinds none is common to all
        raise SnowsError(
            f"torch.export cannot follow this network for batches of any size: {first_line(error)}"
        ) from error
