"""Multiply-accumulates of a forward pass, as papers report them: dense, and what is left of them without the zeros.

Counted where torch runs them, so that nothing has to be known of a network: of every convolution and matrix product,
and to the weight that it multiplies by. Products of two activations, as in attention, belong to no weight. Biases,
normalisation and activations do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snows.network.attention import attention_by_parts
from snows.network.known import layer_name

NO_WEIGHT = ""  # what products of two activations are counted to


def of_convolution(out: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> int:
    """Each number of the output (of a transposed one: of the input) meets in / groups times the kernel."""
    transposed = settings[4]  # after bias, stride, padding, dilation
    return (x if transposed else out).numel() * weight[0].numel()


def of_product(out: Tensor, first: Tensor, second: Tensor) -> int:
    return out.numel() * first.shape[-1]


def of_sum_and_product(out: Tensor, added: Tensor, first: Tensor, second: Tensor) -> int:
    return of_product(out, first, second)


def of_attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> int:
    """Every query with every key, and every weight with every value."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


COUNTS: dict[str, Callable[..., int]] = {
    "convolution": of_convolution,
    "mm": of_product,
    "bmm": of_product,
    "addmm": of_sum_and_product,
    "baddbmm": of_sum_and_product,
}
ATTENTION = "_scaled_dot_product"  # of which each device has several kinds


class Count(TorchDispatchMode):
    """Counts while it is entered: layer name -> multiply-accumulates."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.places = [(p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in model.named_parameters()]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        count = of_attention if name.startswith(ATTENTION) else COUNTS.get(name)
        if count is not None:
            self.macs[self.owner(args)] += count(out, *args)
        return out

    def owner(self, args: tuple) -> str:
        """The layer whose weight, or a part of it, is among what an operation multiplies."""
        for start in (arg.data_ptr() for arg in args if isinstance(arg, Tensor) and arg.ndim > 1):
            for first, end, name in self.places:
                if first <= start < end:
                    return layer_name(name)
        return NO_WEIGHT


@torch.no_grad()
def count(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Layer name -> multiply-accumulates of a pass of these images; NO_WEIGHT for products of activations."""
    counter, training = Count(model), model.training
    device = next((parameter.device for parameter in model.parameters()), images.device)
    with attention_by_parts(), counter:
        model.eval()(images.to(device))
    model.train(training)
    return dict(counter.macs)


def remaining(model: nn.Module, macs: dict[str, int]) -> dict[str, int]:
    """What is left of `macs` where a zero of a weight costs nothing."""
    weights = {layer_name(name): parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    return {
        name: count * int(weights[name].count_nonzero()) // weights[name].numel() if name in weights else count
        for name, count in macs.items()
    }
