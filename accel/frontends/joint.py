"""Rewrites of the joint graph of forward and backward, before it is cut in two.

What is rewritten here decides what training keeps between the two: afterwards each half is a
program of its own, and neither sees the other's values.

`joint_loss`: a cross-entropy has no tensor over all classes but its logits. `pad_products`:
products of 16-bit matrices with odd sizes (a vocabulary of 50257) are computed with whole vectors
of 16 bytes, on GPUs; the padding is zeros. `own_masks`: both halves compute attention's masks of
positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from accel.frontends.joint_loss import fuse_cross_entropy
from accel.frontends.joint_masks import own_masks
from accel.frontends.joint_writer import Writer, value_of

_aten = torch.ops.aten
_VECTOR = 8  # 16-bit elements in 16 bytes
_ROUND = 64
_LEAST = 512  # a shorter side is not worth a copy


def rewrite_joint(joint: fx.GraphModule) -> None:
    """All rewrites, in place. Graphs without their patterns stay as they are."""
    changed = _drop_detaches(joint.graph) + _slice_splits(joint.graph)
    changed += _permute_transposes(joint.graph) + _place_ranges(joint.graph)
    if any(_on_gpu(node) for node in joint.graph.nodes if node.op == "placeholder"):
        changed += pad_products(joint.graph)
    changed += fuse_cross_entropy(joint.graph) + own_masks(joint.graph)
    if changed:
        joint.graph.eliminate_dead_code()
        joint.graph.lint()
        joint.recompile()


def _drop_detaches(graph: fx.Graph) -> int:
    """A joint graph knows no gradients of its own, so detaching is nothing, results aside."""
    found = 0
    for node in list(graph.nodes):
        source = node.args[0] if node.target is _aten.detach.default else None
        if not isinstance(source, fx.Node) or source.op != "call_function":
            continue
        if all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            found += 1
    return found


def _slice_splits(graph: fx.Graph) -> int:
    """The parts of a split become slices: views, which a partitioner computes again for nothing."""
    found = 0
    for node in list(graph.nodes):
        if node.target not in (_aten.split.Tensor, _aten.split_with_sizes.default):
            continue
        source, axis = node.args[0], node.args[2] if len(node.args) > 2 else 0
        values = node.meta["val"]
        sizes = [v.shape[axis] for v in values]
        if node.kwargs or not all(type(s) is int for s in sizes):
            continue
        for part in list(node.users):
            i = part.args[1]
            start = sum(sizes[:i])
            made = Writer(graph, part, part)(
                _aten.slice.Tensor, source, axis, start, start + sizes[i]
            )
            part.replace_all_uses_with(made)
            graph.erase_node(part)
        graph.erase_node(node)
        found += 1
    return found


def _permute_transposes(graph: fx.Graph) -> int:
    """Transposes become permutes, and unsafe views views: partitioners know no others as views."""
    found = 0
    for node in list(graph.nodes):
        value = value_of(node)
        if value is None or node.kwargs:
            continue
        if node.target is _aten.transpose.int:
            axes = list(range(value.dim()))
            first, second = (int(a) % value.dim() for a in node.args[1:])
            axes[first], axes[second] = axes[second], axes[first]
            made = Writer(graph, node, node)(_aten.permute.default, node.args[0], axes)
        elif node.target is _aten._unsafe_view.default:
            made = Writer(graph, node, node)(_aten.view.default, *node.args)
        else:
            continue
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    return found


def _place_ranges(graph: fx.Graph) -> int:
    """The gradient of a table that was read at 0, 1, 2... (learned positions) is what comes in."""
    found = 0
    for node in list(graph.nodes):
        if node.target is not _aten.embedding_dense_backward.default:
            continue
        gradient, places, rows, padding, by_frequency = node.args
        count, value = _range(places), value_of(gradient)
        if count is None or value is None or by_frequency or not count <= rows:
            continue
        if 0 <= padding < count:
            continue
        w = Writer(graph, node, node)
        made = w(_aten.reshape.default, gradient, (count, value.shape[-1]))
        if count < rows:
            made = w(_aten.constant_pad_nd.default, made, [0, 0, 0, rows - count], 0.0)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    return found


def _range(node: fx.Node) -> int | None:
    """The n of 0, 1, 2... n - 1, whatever its shape; None for other numbers."""
    while node.target in (_aten.view.default, _aten.reshape.default, _aten.unsqueeze.default):
        node = node.args[0]  # type: ignore[assignment]
    match node.target, node.args:
        case _aten.arange.default, (int(n),):
            return n
        case _aten.arange.start, (0, int(n)):
            return n
        case _aten.arange.start_step, (0, int(n)) | (0, int(n), 1):
            return n
        case _:
            return None


def _on_gpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cuda"


# -- products ----------------------------------------------------------------------------------


def pad_products(graph: fx.Graph) -> int:
    """Pads what products read to whole vectors, and cuts their results; returns how many."""
    made: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
    nodes = [n for n in graph.nodes if n.target is _aten.mm.default]
    return sum(_pad_product(graph, node, made) for node in nodes)


def _pad_product(
    graph: fx.Graph, node: fx.Node, made: dict[tuple[fx.Node, tuple[int, ...]], fx.Node]
) -> bool:
    left, right = node.args
    a, b = value_of(left), value_of(right)
    if a is None or b is None or a.dtype not in (torch.float16, torch.bfloat16):
        return False
    sizes = (a.shape[0], a.shape[1], b.shape[1])
    if not all(isinstance(s, int) for s in sizes) or min(sizes) < 64:
        return False
    more = [(-s) % _ROUND if s % _VECTOR and s >= _LEAST else 0 for s in sizes]
    if not any(more):
        return False
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    first = _padded(graph, node, left, more[:2], made)
    second = _padded(graph, node, right, more[1:], made)
    w = Writer(graph, node, node)
    result = w(_aten.mm.default, first, second)
    for axis, (size, extra) in enumerate(((sizes[0], more[0]), (sizes[2], more[2]))):
        if extra:
            result = w(_aten.slice.Tensor, result, axis, 0, size)
    node.replace_all_uses_with(result)
    return True


def _padded(
    graph: fx.Graph,
    user: fx.Node,
    node: fx.Node,
    more: Sequence[int],
    made: dict[tuple[fx.Node, tuple[int, ...]], fx.Node],
) -> fx.Node:
    """The matrix with zeros after its rows and columns; one copy for it and its transpose."""
    if not any(more):
        return node
    if node.target in (_aten.t.default, _aten.permute.default, _aten.transpose.int):
        source = node.args[0]
        value = value_of(source)
        turned = node.target is not _aten.permute.default or list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
        if isinstance(source, fx.Node) and value is not None and value.dim() == 2 and turned:
            inner = _padded(graph, user, source, more[::-1], made)
            return Writer(graph, user, user)(_aten.permute.default, inner, [1, 0])
    key = (node, tuple(more))
    if key not in made:
        # Right after what it pads: a later product of the other half may read it as well.
        place = node.next
        while place.op == "placeholder":
            place = place.next
        like = node if node.op == "call_function" else user
        rows, columns = more
        made[key] = Writer(graph, place, like)(
            _aten.constant_pad_nd.default, node, [0, columns, 0, rows], 0.0
        )
    return made[key]
