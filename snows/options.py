"""How a layer is solved: every choice that the objective and the solver leave open, validated when built.

The same dataclass is the library's keyword arguments, the scripts' flags (snows/cli/option_flags.py) and what a run
folder records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from snows.errors import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "best": {},
    # One pass over the layers, each solved once: most of what "best" gains, for a fraction of its time.
    "fast": dict(schedule=0, joint_steps=0),
    # The published method: the dense network on the pruned network's features, the exact Hessian, one step per
    # mini-batch, plain conjugate gradients; depths weighted by the mean over their elements.
    "paper": dict(
        targets="same",
        curvature="hessian",
        depth_weights="mean",
        batching=True,
        preconditioner="none",
        biases=False,
        sweeps=1,
        schedule=0,
        joint_steps=0,
        min_samples=0.0,
        recycle=0,
        newton_steps=3,
        max_CG_iterations=20,
        cg_tolerance=1e-2,
    ),
}


def option(default, help: str, choices: tuple | None = None, **bounds):
    return field(default=default, metadata={"help": help, "choices": choices, **bounds})


@dataclass(frozen=True)
class Options:
    """Options of the objective and the solver; the defaults are the preset "best".

    Raises:
        UsageError: a value outside its range or its choices.
    """

    k_step: int = option(4, "counted operations after each layer whose features are matched; 0: layer-wise", low=0)
    targets: str = option(
        "dense", "features to match: the dense network's own, or the dense network's on the same inputs (paper)",
        ("dense", "same"),
    )  # fmt: skip
    depth_weights: str = option(
        "relative", "weight of each depth: 1 / ||Y_k||^2, or the mean over its elements (paper)", ("relative", "mean")
    )
    curvature: str = option("ggn", "curvature: Gauss-Newton, or the exact Hessian (paper)", ("ggn", "hessian"))
    preconditioner: str = option(
        "rows", "preconditioner of CG: inverses of each output row's curvature on its support, or none (paper)",
        ("rows", "none"),
    )  # fmt: skip
    biases: bool = option(True, "solve the bias (or BatchNorm shift) after a layer with its weights; it is not pruned")
    sweeps: int = option(1, "passes over the layers at the target; all of them are sparse already", low=1, high=1000)
    schedule: int = option(
        2, "sparsities on the way to the target, a pass each; masks are chosen anew from the solved weights",
        low=0, high=1000,
    )  # fmt: skip
    joint_steps: int = option(
        4, "Newton steps on all the layers together after the last pass, whose loss sees all of the network", low=0
    )
    joint_stages: bool = option(
        False, "the joint steps also after each sparsity on the way to the target, whose weights choose the next masks"
    )
    joint_CG_iterations: int = option(10, "curvature products per joint step, at most", low=1)
    joint_images: int = option(
        0, "calibration images that the products of a joint step look at; its gradient looks at all; 0: all", low=0
    )
    recycle: int = option(
        20, "products of a layer's earlier Newton steps, and of the joint ones, that precondition the next; 0: none",
        low=0,
    )  # fmt: skip
    newton_steps: int = option(1, "Newton steps per layer (with --batching True: passes over the batches)", low=1)
    max_CG_iterations: int = option(10, "curvature products per Newton step, at most", low=1)
    curvature_images: int = option(
        0, "calibration images that a layer's products look at; its gradient looks at all; 0: all; "
        "with few, take two steps", low=0,
    )  # fmt: skip
    cg_tolerance: float = option(0.1, "relative residual at which CG stops: Newton's step is inexact", low=0)
    damping: float = option(1e-3, "first Levenberg-Marquardt damping, relative to the curvature", low=0)
    min_samples: float = option(
        2.5, "numbers that the images give of a depth, per surviving weight of a layer: depths of fewer (logits) do "
        "not count; of layers whose own outputs are fewer (heads), only the bias is solved; 0: all count", low=0,
    )  # fmt: skip
    mixtures: int = option(
        0, "mixtures with other images, as many beside each image, that calibrate too: what is solved fits images that "
        "it has not seen better, and takes longer", low=0,
    )  # fmt: skip
    batching: bool = option(False, "True: a Newton step per mini-batch (paper); False: one for all the images")
    batch_size: int = option(128, "calibration images per mini-batch or micro-batch; bounds the memory", low=1)
    memory_budget: float = option(
        0.0, "GiB of memory, on the host and on the device each, that the run may take; 0: what is free", low=0
    )
    precision: str = option(
        "tf32", "of convolutions and matrix products on a GPU: factors rounded to TF32, or not", ("tf32", "highest")
    )
    cache_dir: str = option("", "folder for features that do not fit the memory (default: the system's for such files)")
    w_warm: bool = option(False, "start each layer at its layer-wise least-squares solution on the support")
    seed: int = option(0, "seed of the calibration sample, of mixtures and of the preconditioner's probes", low=0)

    def __post_init__(self):
        for f in fields(self):
            value, name = getattr(self, f.name), f.name
            kind = type(f.default)
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
                raise UsageError(f"{name} must be {kind.__name__}, not {value!r}.")
            if kind is float and not math.isfinite(value):
                raise UsageError(f"{name} must be a finite number, not {value!r}.")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise UsageError(f"{name} must be one of {', '.join(f.metadata['choices'])}, not {value!r}.")
            if not value >= f.metadata.get("low", value):
                raise UsageError(f"{name} must be at least {f.metadata['low']}, not {value!r}.")
            if not value <= f.metadata.get("high", value):
                raise UsageError(f"{name} must be at most {f.metadata['high']}, not {value!r}.")

    @classmethod
    def preset(cls, name: str, **changes) -> Options:
        """The options of a preset (a name in PRESETS), with changes on top."""
        if name not in PRESETS:
            raise UsageError(f"preset '{name}' is none of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def but(self, **changes) -> Options:
        """A copy with some options changed."""
        return replace(self, **changes)
