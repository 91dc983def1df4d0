"""ONNX: one file for batches of any size, read back by ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snows.deploy.checks import ReadBack
from snows.deploy.deployable import Deployable, ExportOptions, program
from snows.errors import SnowsError, first_line

INPUT, OUTPUT = "images", "logits"
LOAD = "import sys, onnxruntime as o; o.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
ALIKE = {"Cast", "Identity"}  # operations on a weight that leave it as it lies
Constants = dict[str, np.ndarray]


def write(deployable: Deployable, file: Path, how: ExportOptions) -> None:
    """Write the folded network; its input is called images, its output logits.

    Raises:
        SnowsError: an operation of it has no counterpart in ONNX, or the file would pass the 2 GB that one may have.
    """
    exported = program(deployable, how)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(exported, verbose=False, input_names=[INPUT], output_names=[OUTPUT])
            made.save(str(file), external_data=False)
    except OSError:  # of the place, not of the network
        raise
    except Exception as error:  # the exporter's errors are many and wrap one another
        raise SnowsError(f"this network cannot be written as ONNX: {first_line(error)}") from error


def read(file: Path, deployable: Deployable) -> ReadBack:
    """The file, run by ONNX Runtime on the CPU, and the weights of its convolutions and products with matrices.

    Raises:
        SnowsError: ONNX Runtime crashes with it.
    """
    import onnx

    check_loads(file)
    started = session(str(file), torch.get_num_threads())

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(started.run(None, {INPUT: images.numpy()})[0])

    return ReadBack(run, weights_of(onnx.load(str(file))))


def check_loads(file: Path) -> None:
    """Let another process load the file first: its graph optimisations end some networks in fp16 by a signal.

    Raises:
        SnowsError: it ended so.
    """
    done = subprocess.run([sys.executable, "-c", LOAD, str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode < 0:
        raise SnowsError(
            f"ONNX Runtime itself crashes (signal {-done.returncode}) as it loads this network, which is not exported: "
            "leave `half` out, or try another version of onnxruntime."
        )


def session(model: str | bytes, threads: int) -> Any:
    """ONNX Runtime on the CPU, with a file or its content."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which would count as CPU time
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def weights_of(model: Any) -> list[tuple[str, Tensor]]:
    """The weight of each Conv, Gemm and MatMul, (out, in, ...), where it is a constant."""
    from onnx import helper, numpy_helper

    constants: Constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    found = []
    for node in model.graph.node:
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Constant" and "value" in given:
            constants[node.output[0]] = numpy_helper.to_array(given["value"])
        elif node.op_type in ALIKE and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif node.op_type == "Transpose" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]].transpose(given.get("perm"))
        else:
            weight = summed_second(node.op_type, given, list(node.input), constants)
            if weight is not None:
                found.append((node.name, torch.from_numpy(np.array(weight, dtype=np.float32))))
    return found


def summed_second(kind: str, given: dict, inputs: list[str], constants: Constants) -> np.ndarray | None:
    """The constant weight of an operation, turned so that the axis which it sums over is the second; None: it has none.

    given: the operation's attributes.
    """
    right = constants.get(inputs[1]) if len(inputs) > 1 else None
    if kind == "Conv":
        return right  # (out, in / groups, ...)
    if kind == "Gemm" and right is not None:
        return right if given.get("transB") else right.T
    if kind == "MatMul" and right is not None and right.ndim == 2:
        return right.T
    if kind == "MatMul" and inputs[0] in constants and constants[inputs[0]].ndim == 2:
        return constants[inputs[0]]
    return None
