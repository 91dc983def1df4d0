"""A network as a module of plain operations, so that the layers inside torch's attention can be replaced as others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from snows.network.layers import Layer
from snows.network.network import Network
from snows.network.operations import LinearMap


def mapped_layers(network: Network) -> Iterator[tuple[Layer, LinearMap]]:
    """The layers whose weight multiplies in one operation alone, a convolution or a linear map."""
    for layer in network.layers:
        mapped = network.linear_maps.get(layer.node)
        if mapped is not None and network.users(layer.parameter) == [layer.node]:
            yield layer, mapped


def bias_of(network: Network, mapped: LinearMap) -> Tensor | None:
    """What a layer adds to its product."""
    return dict(network.model.named_parameters()).get(mapped.bias or "")


def as_module(network: Network, replaced: dict[fx.Node, nn.Module]) -> fx.GraphModule:
    """The network's operations, some of them replaced by modules of what they read first; the network goes with it."""
    graph = network.nodes[0].graph
    for number, (node, module) in enumerate(replaced.items()):
        name = f"replaced_{number}"
        setattr(network.model, name, module)
        with graph.inserting_after(node):
            node.replace_all_uses_with(graph.call_module(name, node.args[:1]))
        graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    return fx.GraphModule(network.model, graph)
