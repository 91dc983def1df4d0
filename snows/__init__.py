"""SNOWS: one-shot pruning of vision networks by a Hessian-free second-order method (arXiv 2411.18376)."""

from snows.errors import SnowsError, TraceError, UsageError
from snows.masks.patterns import NM, Unstructured
from snows.options import Options
from snows.pipeline import prune
from snows.result import LayerRecord, Pruned, sparsity

__all__ = [
    "NM",
    "LayerRecord",
    "Options",
    "Pruned",
    "SnowsError",
    "TraceError",
    "Unstructured",
    "UsageError",
    "prune",
    "sparsity",
]
__version__ = "0.2.0"
