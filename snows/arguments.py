"""What `prune` is called with, checked before anything is computed."""

from __future__ import annotations

from typing import Any

from snows.errors import UsageError
from snows.masks.patterns import NM, Unstructured
from snows.masks.saliency import SALIENCIES
from snows.masks.selection import Choice, Selection, every_layer
from snows.methods import METHODS, Method
from snows.network.checks import check_device, check_model
from snows.network.network import Network
from snows.options import Options


def check_arguments(model: Any, choice: Choice, options: Any, algo: Any, device: Any) -> None:
    """Refuse arguments of `prune` that it cannot do anything with; `choice` holds those of the masks.

    Raises:
        UsageError: one of them is none of what it may be. TraceError: the model is no plain module.
    """
    pattern, mask_alg, layers = choice.pattern, choice.mask_alg, choice.layers
    check_device(device)
    if not isinstance(model, Network):
        check_model(model)
    if not isinstance(pattern, (Unstructured, NM, dict, Selection)):
        raise UsageError(
            f"the pattern must be snows.Unstructured(...), snows.NM(...), or masks, {{layer name: tensor}}, "
            f"not {pattern!r}."
        )
    if not isinstance(options, Options):
        raise UsageError(f"options must be snows.Options(...), not {type(options).__name__}.")
    for chosen, known in ((algo, METHODS), (mask_alg, SALIENCIES)):
        if not (isinstance(chosen, str) and chosen in known) and not (known is METHODS and isinstance(chosen, Method)):
            raise UsageError(f"algorithm '{chosen}' is not one of {', '.join(known)}.")
    if isinstance(pattern, (dict, Selection)) and mask_alg != "MP":
        raise UsageError(f"the masks are given: there is nothing for {mask_alg} to choose.")
    if isinstance(pattern, Selection) and layers is not every_layer:
        raise UsageError("the masks are given: there are no `layers` to choose.")
    if not isinstance(choice.keep_zeros, bool):
        raise UsageError(f"keep_zeros must be bool, not {choice.keep_zeros!r}.")
    if isinstance(pattern, Selection) and not choice.keep_zeros:
        raise UsageError("the masks are given: `keep_zeros` says nothing about them; it is for snows.choose_masks.")
    if not callable(layers):
        raise UsageError("layers must be a function that says of a layer's name whether to prune it.")
