"""What runs a network on a CPU: torch, torch with sparse products, and the runtimes that are installed.

A backend of your own is an entry of BACKENDS.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snows.deploy import int8, onnx
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.opened import as_module, bias_of, mapped_layers
from snows.deploy.packages import missing
from snows.errors import SnowsError
from snows.network.logits import logits_of
from snows.network.network import Network
from snows.zoo.arrays import NO_LABEL

Run = Callable[[], Any]  # one forward pass, which gives the logits


@dataclass
class Subject:
    """A network in evaluation mode and the images that it is to run on, converted once for all backends."""

    model: nn.Module
    images: Tensor

    @cached_property
    def deployable(self) -> Deployable:
        """The network as exports take it."""
        labels = torch.full((len(self.images),), NO_LABEL)
        return Deployable(self.model, {}, lambda: [(self.images, labels)], lambda: self.images)

    @cached_property
    def onnx(self) -> bytes:
        """What the export onnx writes."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.onnx")
            onnx.write(self.deployable, file, ExportOptions())
            return file.read_bytes()


@dataclass(frozen=True)
class Backend:
    """build: (network, threads) -> its forward pass, or None where the backend would do nothing of its own to it."""

    build: Callable[[Subject, int], Run | None]
    needs: tuple[str, ...] = ()  # packages

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return missing(self.needs)


def eager(subject: Subject, threads: int) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            return logits_of(subject.model(subject.images))

    return run


class SparseProduct(nn.Module):
    """A linear map, or a 1 x 1 convolution, whose weight is stored by rows without its zeros (CSR)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, convolution: nn.Conv2d | None):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that CSR tensors are new
            self.weight = weight.detach().flatten(1).to_sparse_csr()  # (out, in)
        self.bias = None if bias is None else bias.detach()[:, None]  # (out, 1)
        self.stride = None if convolution is None else convolution.stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride is None:
            return self.product(x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        down, right = self.stride
        x = x[:, :, ::down, ::right].movedim(1, 0)  # (in, n, h, w)
        return self.product(x.flatten(1)).unflatten(1, x.shape[1:]).movedim(0, 1)

    def product(self, columns: Tensor) -> Tensor:
        """(in, n) -> (out, n)"""
        if self.bias is None:
            return self.weight @ columns
        return torch.addmm(self.bias.expand(-1, columns.shape[1]), self.weight, columns)


def csr(subject: Subject, threads: int) -> Run | None:
    """torch with CSR products in the 1 x 1 convolutions and linear maps that have zeros; None where none has."""
    network, replaced = Network(subject.model, example=subject.images), {}
    for layer, mapped in mapped_layers(network):
        weight, convolution = network.model.get_parameter(layer.parameter), mapped.convolution
        if (convolution is None or is_pointwise(convolution)) and not weight.all():
            replaced[layer.node] = SparseProduct(weight, bias_of(network, mapped), convolution)
    return eager(Subject(as_module(network, replaced), subject.images), threads) if replaced else None


def is_pointwise(convolution: nn.Conv2d) -> bool:
    """Whether a convolution multiplies the channels of each pixel by one matrix."""
    padded = convolution.padding not in ("valid", (0, 0))
    return convolution.kernel_size == (1, 1) and convolution.groups == 1 and not padded


def onnxruntime(subject: Subject, threads: int) -> Run:
    session, inputs = onnx.session(subject.onnx, threads), {onnx.INPUT: subject.images.numpy()}
    return lambda: session.run(None, inputs)[0]


def openvino(subject: Subject, threads: int, precision: str) -> Run:
    """Raises: SnowsError: the processor has no such numbers."""
    core = import_module("openvino").Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise SnowsError("this processor has no bfloat16")
    model, images = core.read_model(subject.onnx), subject.images.numpy()
    return infers(core, model, images, threads, precision)


def openvino_int8(subject: Subject, threads: int) -> Run:
    """As the export int8, with ranges from these images alone: enough for its time, not for its accuracy."""
    core = import_module("openvino").Core()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "int8.xml")
        int8.write(subject.deployable, file, ExportOptions())
        model = core.read_model(str(file))
        return infers(core, model, subject.images.numpy(), threads, "f32")


def infers(core: Any, model: Any, images: Any, threads: int, precision: str) -> Run:
    """A pass of OpenVINO; the model, which takes batches of any size, is first set to this one."""
    model.reshape(list(images.shape))
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer([images], share_inputs=True, share_outputs=True)[0]


ONNX = ("onnx", "onnxscript")
BACKENDS = {
    "torch": Backend(eager),
    "torch CSR": Backend(csr),
    "onnxruntime": Backend(onnxruntime, (*ONNX, "onnxruntime")),
    "OpenVINO f32": Backend(partial(openvino, precision="f32"), (*ONNX, "openvino")),
    "OpenVINO bf16": Backend(partial(openvino, precision="bf16"), (*ONNX, "openvino")),
    "OpenVINO int8": Backend(openvino_int8, (*ONNX, "openvino", "nncf")),
}
