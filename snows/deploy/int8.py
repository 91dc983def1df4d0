"""int8 by OpenVINO and NNCF: weights and features in eight bits, their ranges taken from the calibration images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snows.deploy.checks import ReadBack, matches
from snows.deploy.deployable import Deployable, ExportOptions, program, reading_images
from snows.deploy.onnx import INPUT, OUTPUT
from snows.errors import UsageError
from snows.network.known import weight_name

IMAGES = 300  # of the calibration images, as many as NNCF takes unless told otherwise
ATTENTION = {"ScaledDotProductAttention", "Softmax"}
MAPS = {"Convolution", "GroupConvolution", "MatMul"}
NONE = "none"  # of the layers stays in float, and NNCF is told nothing of attention: its own defaults


def write(deployable: Deployable, file: Path, how: ExportOptions) -> None:
    """Write the network in int8 as OpenVINO's pair of files, .xml and .bin.

    Raises:
        UsageError: a pattern of `int8_float` is no layer's.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses CUDA, which nobody needs
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = openvino.convert_model(program(deployable, ExportOptions()))
    model.inputs[0].set_names({INPUT})
    model.outputs[0].set_names({OUTPUT})
    state = deployable.folded.state_dict()
    layers = {name: state[weight_name(name, state)] for name in float_layers(deployable, how.int8_float)}
    operations = [where for where, _ in matches(layers, weights_of(model)).values()]
    with reading_images():
        images = [image[None].numpy() for image in deployable.calibration()[:IMAGES]]
    attention = ATTENTION & {operation.get_type_name() for operation in model.get_ops()}
    careful = attention and tuple(how.int8_float) != (NONE,)
    with redirect_stdout(StringIO()):  # its progress bars
        quantised = nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if careful else None,
            ignored_scope=nncf.IgnoredScope(names=operations),
        )
    openvino.save_model(quantised, str(file), compress_to_fp16=False)


def read(file: Path, deployable: Deployable) -> ReadBack:
    """The file, run by OpenVINO on the CPU, and its weights as the numbers that they stand for."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(file))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(compiled([images.numpy()])[0]))

    return ReadBack(run, weights_of(model))


def float_layers(deployable: Deployable, patterns: Iterable[str]) -> list[str]:
    """The layers that stay in float: those of the patterns, or else the first convolutions.

    Raises:
        UsageError: a pattern is no layer's.
    """
    patterns = tuple(patterns)
    if patterns == (NONE,):
        return []
    layers = {
        name: module for name, module in deployable.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    if not patterns:
        return first_convolutions(layers)
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in layers)]
    if unknown:
        raise UsageError(f"`int8_float`: no layer is called {', '.join(unknown)}; there are {', '.join(layers)}.")
    return [name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns)]


def first_convolutions(layers: dict[str, nn.Module]) -> list[str]:
    """The convolutions before the first linear map, as a transformer's stem has them; of a CNN the first alone."""
    kinds = [isinstance(layer, nn.Conv2d) for layer in layers.values()]
    leading = kinds.index(False) if False in kinds else len(kinds)
    return list(layers)[: leading if leading <= len(kinds) // 2 else 1]


def weights_of(model: Any) -> list[tuple[str, Tensor]]:
    """The weight of each convolution and product with a matrix, (out, in, ...), where it is a constant."""
    found = []
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind in MAPS:
            weight = value(operation.input_value(1).get_node())
            if weight is not None:
                found.append((operation.get_friendly_name(), torch.from_numpy(summed_second(operation, kind, weight))))
    return found


def summed_second(operation: Any, kind: str, weight: np.ndarray) -> np.ndarray:
    """A weight so that its second axis is the one which the operation sums over."""
    if kind == "GroupConvolution":
        return weight.reshape(-1, *weight.shape[2:])  # (groups, out / groups, in / groups, ...)
    if kind == "MatMul" and not operation.get_attributes()["transpose_b"]:
        return np.ascontiguousarray(weight.swapaxes(-1, -2))
    return weight


def value(node: Any) -> np.ndarray | None:
    """The numbers that constants, and the steps which make numbers of int8, come to; None: they depend on images."""
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.get_data())
    inputs = [value(node.input_value(i).get_node()) for i in range(node.get_input_size())]
    if not inputs or any(each is None for each in inputs):
        return None
    first, *others = inputs
    assert first is not None
    if kind == "Convert":
        return first.astype(np.float32)
    if kind == "Subtract":
        return first - others[0]
    if kind == "Multiply":
        return first * others[0]
    if kind == "Reshape":
        return first.reshape(others[0])
    return first.transpose(others[0]) if kind == "Transpose" else None
