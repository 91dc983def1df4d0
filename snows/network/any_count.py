"""Two records of a forward pass, with other numbers of images, as the graph of any number of images."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from snows.errors import TraceError
from snows.network.trace import fetch

COUNTS = (2, 3)  # images that a network is traced with; no whole multiple of the one is the same multiple of the other


def for_any_count(first: fx.Graph, second: fx.Graph, model: nn.Module) -> fx.Graph:
    """The graph of any number of images, from those of COUNTS.

    Raises:
        TraceError: they do more than count images differently.
    """
    for graph in (first, second):
        for node in reversed(graph.nodes):
            if node.target is operator.getitem and not node.users:
                graph.erase_node(node)  # a part that nothing reads
    merge = Merge(first, model)
    if len(first.nodes) != len(second.nodes):
        raise TraceError("other operations with another number of images: it loops over them, say")
    for ours, other in zip(list(first.nodes), list(second.nodes)):
        merge.add(ours, other)
    return first


class Merge:
    """Two records of a forward pass, the second with more images, as one, node by node."""

    def __init__(self, graph: fx.Graph, model: nn.Module):
        self.graph, self.model = graph, model
        self.images = next(iter(graph.nodes))
        self.twin: dict[fx.Node, fx.Node] = {}
        self.multiples: dict[int, fx.Node] = {}

    def add(self, ours: fx.Node, other: fx.Node) -> None:
        """Make a node of the first record that of any number of images."""
        self.twin[other] = ours
        same = ours.op == other.op and ours.target == other.target
        if ours.op == other.op == "get_attr" and not same:  # tensors that the forward pass makes
            same = torch.equal(fetch(self.model, ours.target), fetch(self.model, other.target))
            if not same:
                raise TraceError("it makes a tensor of the images in a way that is not recorded")
        if not same:
            raise TraceError(f"{ours.name} is another with another number of images")
        ours.args, ours.kwargs = self.of(ours.args, other.args), self.of(ours.kwargs, other.kwargs)

    def of(self, ours: Any, other: Any) -> Any:
        """What stands for an argument, given as in the two records."""
        if isinstance(ours, fx.Node):
            if self.twin.get(other) is not ours:
                raise TraceError(f"{ours.name} is read elsewhere with another number of images")
            return ours
        if isinstance(ours, (tuple, list)) and len(ours) == len(other):
            return type(ours)(self.of(*pair) for pair in zip(ours, other))
        if isinstance(ours, dict) and ours.keys() == other.keys():
            return {key: self.of(each, other[key]) for key, each in ours.items()}
        if isinstance(ours, slice):
            return slice(*(self.of(getattr(ours, k), getattr(other, k)) for k in ("start", "stop", "step")))
        if ours == other:
            return ours
        times, left = divmod(ours, COUNTS[0]) if isinstance(ours, int) else (0, 1)
        if left or other != times * COUNTS[1]:
            raise TraceError(f"a number is {ours} with {COUNTS[0]} images and {other} with {COUNTS[1]}")
        return self.multiple(times)

    def multiple(self, times: int) -> fx.Node:
        """The node that counts so many for each image."""
        if times not in self.multiples:
            before = self.images if times == 1 else self.multiple(1)
            with self.graph.inserting_after(before):
                self.multiples[times] = (
                    self.graph.call_method("size", (self.images, 0))
                    if times == 1
                    else self.graph.call_function(operator.mul, (before, times))
                )
        return self.multiples[times]
