"""Attention masks in a joint graph: forward and backward compute each their own.

A mask of positions ([S, T] of comparisons of ranges) that both halves read would be computed once
and kept between them, an element for each pair of query and key; the backward program would then
read a tensor of which it does not know what it says. Computed again it costs nothing: the kernels
compare positions themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_MOST = 64  # nodes of one mask
_RANGES = (_aten.arange.default, _aten.arange.start)
# Where a backward has its mask: a position, or a keyword.
_BACKWARD: dict[Any, int | str] = {
    _aten._scaled_dot_product_efficient_attention_backward.default: 4,
    _aten._scaled_dot_product_cudnn_attention_backward.default: 8,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "attn_mask",
}


def own_masks(graph: fx.Graph) -> int:
    """Copies the masks of attention for their backward; returns how many."""
    made: dict[fx.Node, fx.Node] = {}
    found = 0
    for node in list(graph.nodes):
        place = _BACKWARD.get(node.target)
        if place is None:
            continue
        mask = node.kwargs.get(place) if isinstance(place, str) else node.args[place]
        parts = _computed(mask)
        if not parts:
            continue
        for part in parts:  # the nodes of a graph are in order: the first backward has them first
            if part not in made:
                made[part] = _copy(graph, part, made, node)
        copy = made[mask]
        if isinstance(place, str):
            node.update_kwarg(place, copy)
        else:
            node.update_arg(place, copy)
        found += 1
    return found


def _computed(mask: Any) -> list[fx.Node]:
    """The nodes that compute a mask out of ranges, numbers and arguments, in order; none if it is
    made in another way."""
    if not isinstance(mask, fx.Node):
        return []
    inside: dict[fx.Node, None] = {}
    pending, ranges = [mask], False
    while pending:
        node = pending.pop()
        if "tangents" in node.name:
            return []
        if node in inside or node.op == "placeholder" or _is_size(node):
            continue
        if not _is_plain(node) or len(inside) >= _MOST:
            return []
        inside[node] = None
        ranges |= node.target in _RANGES
        pending += node.all_input_nodes
    return [n for n in mask.graph.nodes if n in inside] if ranges else []


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat))


def _is_plain(node: fx.Node) -> bool:
    """An elementwise op, a view, or a tensor out of numbers: nothing random, nothing costly."""
    target, value = node.target, node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor):
        return False
    if target in _RANGES or not node.all_input_nodes:
        return torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())
    schema = getattr(target, "_schema", None)
    is_view = schema is not None and any(
        a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments
    )
    return is_view or torch.Tag.pointwise in getattr(target, "tags", ()) or target in _MORE


_MORE = (_aten._to_copy.default, _aten.clone.default)


def _copy(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    """The node over copies of what it reads. A range gets another overload, so that nothing takes
    it for the forward's."""
    target, args = node.target, tuple(node.args)
    if target is _aten.arange.default:
        target, args = _aten.arange.start, (0, *args)
    elif target is _aten.arange.start:
        target, args = _aten.arange.start_step, (*args, 1)
    with graph.inserting_before(before):
        copy = graph.call_function(
            target,  # type: ignore[arg-type]
            fx.map_arg(args, lambda n: made.get(n, n)),
            fx.map_arg(dict(node.kwargs), lambda n: made.get(n, n)),
        )
    copy.meta = dict(node.meta)
    copy.meta.pop("partitioner_tag", None)
    return copy
