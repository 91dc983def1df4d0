"""torch's attention and its encoders, opened up into the linear maps and the attention that they are made of.

nn.MultiheadAttention hides its projections in one call, nn.TransformerEncoder a whole network. As operations of their
own they are prunable layers like any other: the queries', keys' and values' joint `in_proj`, one weight of 3 d rows,
and `out_proj`; in an encoder `linear1` and `linear2` besides.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from snows.network.known import is_plain


@contextmanager
def attention_by_parts() -> Iterator[None]:
    """Without torch's fast path, which hides the projections of nn.MultiheadAttention in one operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def is_encoder_without_masks(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a call is one of torch's own encoders, or a layer of it, on tokens that all see one another."""
    if not is_plain(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        return False
    asked = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return all(value is None or value is False for name, value in asked.items() if name != "src")


def encode(module: nn.Module, src: fx.Proxy, *args: Any, **kwargs: Any) -> fx.Proxy:
    """What an encoder, or a layer of it, computes without masks: its sub-modules, called one by one."""
    if isinstance(module, nn.TransformerEncoder):
        for layer in module.layers:
            src = layer(src)
        return src if module.norm is None else module.norm(src)

    def attend(x: fx.Proxy) -> fx.Proxy:
        return module.dropout1(module.self_attn(x, x, x, need_weights=False)[0])

    def feed(x: fx.Proxy) -> fx.Proxy:
        return module.dropout2(module.linear2(module.dropout(module.activation(module.linear1(x)))))

    if module.norm_first:
        src = src + attend(module.norm1(src))
        return src + feed(module.norm2(src))
    src = module.norm1(src + attend(src))
    return module.norm2(src + feed(src))


def open_attention(graph: fx.Graph, model: nn.Module) -> None:
    """Replace every self-attention module of the graph by  linear -> attention -> linear  on its own parameters."""
    for node in list(graph.nodes):
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if is_plain(module, [nn.MultiheadAttention]) and is_self_attention(node, module):
            with graph.inserting_before(node):
                opened = insert(graph, node, module)
            for item in list(node.users):
                item.replace_all_uses_with(opened)  # no one reads the attention weights
                graph.erase_node(item)
            graph.erase_node(node)


def is_self_attention(node: fx.Node, module: nn.MultiheadAttention) -> bool:
    """Whether a call is self-attention without masks, of which only the output is used, not the attention weights."""
    asked = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
    query, key, value = (asked[name] for name in ("query", "key", "value"))
    only_output = all(is_output(user) or not user.users for user in node.users)
    masked = any(asked.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
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

    def transposed(x: fx.Node, first: int, second: int) -> fx.Node:
        return graph.call_method("transpose", (x, first, second))

    tokens = node.args[0]
    if not module.batch_first:
        tokens = transposed(tokens, 0, -2)
    projected = linear(tokens, "in_proj_weight", "in_proj_bias")
    # (batch, tokens, 3 d) -> three times (batch, heads, tokens, d / heads)
    parts = graph.call_method("unflatten", (projected, -1, (3, module.num_heads, -1)))
    q, k, v = (transposed(graph.call_method("select", (parts, -3, i)), -2, -3) for i in range(3))
    attended = graph.call_function(F.scaled_dot_product_attention, (q, k, v))
    merged = graph.call_method("flatten", (transposed(attended, -2, -3), -2))
    result = linear(merged, "out_proj.weight", "out_proj.bias")
    return result if module.batch_first else transposed(result, 0, -2)
