"""SNOWS: one-shot pruning of vision networks by a Hessian-free second-order method (arXiv 2411.18376)."""

import snows.cli.loading  # noqa: F401, for what follows takes seconds
from snows import semi_structured
from snows.cli.run_folder import load as load_run
from snows.errors import SnowsError, TraceError, UsageError
from snows.masks.patterns import NM, Unstructured
from snows.masks.permute import permute
from snows.masks.selection import Selection
from snows.network.network import Network
from snows.options import Options
from snows.pipeline import choose_masks, prune
from snows.result import LayerRecord, Pruned, sparsity

__all__ = [
    "NM",
    "LayerRecord",
    "Network",
    "Options",
    "Pruned",
    "Selection",
    "SnowsError",
    "TraceError",
    "Unstructured",
    "UsageError",
    "choose_masks",
    "load_run",
    "permute",
    "prune",
    "semi_structured",
    "sparsity",
]
__version__ = "0.2.0"
