"""torch's nn.MultiheadAttention, opened up into the linear maps and the attention that it is made of.

The module hides its projections in one call. As operations of the line they are prunable layers like any other: the
queries', keys' and values' joint `in_proj`, one weight of 3 d rows, and `out_proj`.
"""

from __future__ import annotations

import operator

import torch.nn.functional as F
from torch import Tensor, fx, nn


def attend(projected: Tensor, heads: int, batch_first: bool) -> Tensor:
    """softmax(q k^T / sqrt(d / heads)) v of each head: (batch, tokens, 3 d) -> (batch, tokens, d)."""
    if not batch_first and projected.ndim == 3:
        return attend(projected.transpose(0, 1), heads, True).transpose(0, 1)
    q, k, v = (part.transpose(-2, -3) for part in projected.unflatten(-1, (3, heads, -1)).unbind(-3))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


def open_attention(graph: fx.Graph, model: nn.Module) -> None:
    """Replace every self-attention module of the graph by  linear -> attend -> linear  on its own parameters."""
    for node in list(graph.nodes):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.MultiheadAttention) and is_plain(node, module):
            with graph.inserting_before(node):
                opened = insert(graph, node, module)
            for item in list(node.users):
                item.replace_all_uses_with(opened)  # no one reads the attention weights
                graph.erase_node(item)
            graph.erase_node(node)


def is_plain(node: fx.Node, module: nn.MultiheadAttention) -> bool:
    """Whether a call is self-attention without masks, of which only the output is used, not the attention weights."""
    query, key, value = (*node.args, *(node.kwargs[name] for name in ("query", "key", "value") if name in node.kwargs))[
        :3
    ]
    only_output = all(is_output(user) or not user.users for user in node.users)
    masked = len(node.args) > 3 or any(node.kwargs.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
    extended = module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn
    return query is key is value and only_output and not masked and not extended


def is_output(node: fx.Node) -> bool:
    """Whether a node takes the output, not the attention weights, of the pair that a module returns."""
    return node.target is operator.getitem and node.args[1] == 0


def insert(graph: fx.Graph, node: fx.Node, module: nn.MultiheadAttention) -> fx.Node:
    """The opened operations, in front of the module's own node; returns the last one."""

    def linear(x: fx.Node, weight: str, bias: str) -> fx.Node:
        biased = module.in_proj_bias is not None  # which goes for both projections
        parameters = [graph.get_attr(f"{node.target}.{name}") for name in (weight, bias)[: 1 + biased]]
        return graph.call_function(F.linear, (x, *parameters))

    tokens = node.args[0] if node.args else node.kwargs["query"]
    projected = linear(tokens, "in_proj_weight", "in_proj_bias")
    attended = graph.call_function(attend, (projected, module.num_heads, module.batch_first))
    return linear(attended, "out_proj.weight", "out_proj.bias")
