"""Operations that torch cannot differentiate in the way that products need: which one it is, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from snows.errors import Unsolvable, listed
from snows.network.window import Window

# What torch says of operations that lack a derivative, which it mostly names.
NO_DERIVATIVE = re.compile(
    r"derivative for (?:aten::)?(\w+) is not impl|forward AD with (?:aten::)?(\w+) that|"
    r"backward through ([\w.:]+?)(?:\.default)? but no autograd|custom autograd.Function to use it with \w+ mode AD|"
    r"marked with @once_differentiable|numpy\(\) on Tensor that requires grad|modified by an inplace operation"
)


@contextmanager
def explained(window: Window) -> Iterator[None]:
    """Turn torch's complaints about a missing derivative into a line that names the operation.

    Raises:
        Unsolvable: torch complained.
    """
    try:
        yield
    except RuntimeError as error:  # of which NotImplementedError is one
        missing = NO_DERIVATIVE.search(str(error))
        if missing is None:
            raise
        operation = next((name for name in missing.groups() if name), "").removesuffix("_backward") or foreign(window)
        place, holder, advice = f"layer {window.layers[0].name}", "its window", "a smaller `k_step`"
        if len(window.layers) > 1:
            place, holder, advice = "all the layers together", "the network", "`joint_steps` 0"
        if "forward" in missing[0].split(operation)[0]:
            advice += ", or `curvature` hessian"  # which takes no tangents
        problem = (
            f"torch cannot differentiate {operation}, which {holder} holds, in the way that products need. "
            f"Replace that operation, or use {advice}"
        )
        raise Unsolvable(f"cannot solve {place}: {problem}.", problem) from error


def foreign(window: Window) -> str:
    """The operations of a window that are not torch's own: torch does not name those that it cannot differentiate."""
    kinds = [type(window.module(node)) if node.op == "call_module" else node.target for node in window.nodes]
    named = [kind for kind in kinds if not isinstance(kind, str)]
    others = [kind for kind in named if not re.match(r"(torch|_operator|math|None)(\.|$)", str(kind.__module__))]
    return listed(dict.fromkeys(kind.__name__ for kind in others)) or "an operation"
