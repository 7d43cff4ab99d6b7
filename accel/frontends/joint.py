"""Rewrites of the joint graph of forward and backward, before it is cut in two.

What is rewritten here decides what training keeps between the two: afterwards each half is a
program of its own, and neither sees the other's values.

`fuse_cross_entropy`: log-softmax and nll-loss with their gradients become a logsumexp a row, kept
in float32, and one elementwise gradient: no tensor over all classes but the logits is kept, and
none is made in float32. `pad_products`: products of 16-bit matrices with odd sizes (a vocabulary
of 50257) are computed with whole vectors of 16 bytes, on GPUs; the padding is zeros. `own_masks`:
both halves compute attention's masks of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from accel.frontends.joint_masks import own_masks

_aten = torch.ops.aten
_KEPT = ("stack_trace", "nn_module_stack", "partitioner_tag", "seq_nr", "autograd_backward")
_VECTOR = 8  # 16-bit elements in 16 bytes
_ROUND = 64
_LEAST = 512  # a shorter side is not worth a copy
_MEAN = 1


def rewrite_joint(joint: fx.GraphModule) -> None:
    """All rewrites, in place. Graphs without their patterns stay as they are."""
    changed = _drop_detaches(joint.graph) + _slice_splits(joint.graph)
    changed += _permute_transposes(joint.graph)
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
            made = _Writer(graph, part, part)(
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
        value = _value(node)
        if value is None or node.kwargs:
            continue
        if node.target is _aten.transpose.int:
            axes = list(range(value.dim()))
            first, second = (int(a) % value.dim() for a in node.args[1:])
            axes[first], axes[second] = axes[second], axes[first]
            made = _Writer(graph, node, node)(_aten.permute.default, node.args[0], axes)
        elif node.target is _aten._unsafe_view.default:
            made = _Writer(graph, node, node)(_aten.view.default, *node.args)
        else:
            continue
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    return found


def _on_gpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cuda"


class _Writer:
    """Adds nodes at one place of a graph, with the fake values that a partitioner reads."""

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node) -> None:
        self.graph, self.before = graph, before
        self.meta = {k: like.meta[k] for k in _KEPT if k in like.meta}
        values = torch.utils._pytree.tree_leaves(like.meta["val"])
        self.mode = next(v.fake_mode for v in values if isinstance(v, FakeTensor))

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            value = target(*fakes[0], **fakes[1])
        node.meta = {**self.meta, "val": value}
        return node


def _value(node: Any) -> Tensor | None:
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


# -- cross-entropy -----------------------------------------------------------------------------


def fuse_cross_entropy(graph: fx.Graph) -> int:
    """Rewrites every cross-entropy over rows [N, C]; returns how many.

    The log probabilities must have no other use, and classes no weights.
    """
    found = 0
    for node in list(graph.nodes):
        if node.target is _aten._log_softmax.default:
            parts = _cross_entropy(node)
            if parts is not None:
                _CrossEntropy(graph, node, *parts).run()
                found += 1
    return found


def _cross_entropy(node: fx.Node) -> tuple[fx.Node, list[fx.Node], fx.Node | None] | None:
    """The loss, its two results, and the gradient for the logits, if this is all there is."""
    x, axis, _ = node.args
    value = _value(x)
    if value is None or value.dim() != 2 or axis not in (1, -1):
        return None
    loss: fx.Node | None = None
    nll: fx.Node | None = None
    soft: fx.Node | None = None
    for user in node.users:
        if user.target is _aten.nll_loss_forward.default and loss is None:
            loss = user
        elif user.target is _aten.nll_loss_backward.default and nll is None:
            nll = user
        elif user.target is _aten._log_softmax_backward_data.default and soft is None:
            soft = user
        else:
            return None
    if loss is None or loss.args[0] is not node or loss.args[2] is not None:
        return None
    results = list(loss.users)
    if any(getattr(r.target, "__name__", "") != "getitem" for r in results):
        return None
    if (nll is None) != (soft is None):
        return None
    if nll is not None and soft is not None:
        whole = list(nll.users) == [soft] and soft.args[0] is nll and soft.args[1] is node
        if not whole or nll.args[1] is not node or nll.args[2:6] != loss.args[1:5]:
            return None
        if soft.args[2] not in (1, -1):
            return None
    return loss, results, soft


class _CrossEntropy:
    """The rewrite of one cross-entropy. `soft` is the gradient's last node, if there is one."""

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        loss: fx.Node,
        results: list[fx.Node],
        soft: fx.Node | None,
    ) -> None:
        self.graph, self.node, self.loss, self.results, self.soft = graph, node, loss, results, soft
        self.padded = _padded_source(node.args[0])
        self.forward = True

    def run(self) -> None:
        logits = self.node.args[0]
        target, reduction, ignore = self.loss.args[1], self.loss.args[3], self.loss.args[4]
        w = _Writer(self.graph, self.loss, self.loss)
        assert isinstance(logits, fx.Node)
        wide = self._wide(w, float("-inf"))
        top = w(_aten.amax.default, wide, [1], True)
        powers = w(_aten.exp.default, w(_aten.sub.Tensor, wide, top))
        logs = w(_aten.log.default, w(_aten.sum.dim_IntList, powers, [1], True))
        total = w(_aten.add.Tensor, logs, top)  # logsumexp, [N, 1]
        column = w(_aten.unsqueeze.default, target, 1)
        valid = w(_aten.ne.Scalar, column, ignore)
        safe = w(_aten.where.self, valid, column, w(_aten.full_like.default, column, 0))
        picked = w(_aten.gather.default, logits, 1, safe)
        picked = w(_aten._to_copy.default, picked, dtype=torch.float32)
        each = w(_aten.sub.Tensor, total, picked)
        zero = w(_aten.full_like.default, each, 0.0)
        each = w(_aten.where.self, valid, each, zero)
        counted = w(_aten._to_copy.default, valid, dtype=torch.float32)
        count = w(_aten.sum.dim_IntList, counted, [0, 1])
        result = w(_aten.squeeze.dim, each, 1)
        if reduction:
            result = w(_aten.sum.dim_IntList, each, [0, 1])
        if reduction == _MEAN:
            result = w(_aten.div.Tensor, result, count)
        for node in self.results:
            made = result if node.args[1] == 0 else count
            value = _value(node)
            assert value is not None
            if made is count and not reduction:
                made = w(_aten.mul.Tensor, count, 0.0)
            node.replace_all_uses_with(w(_aten._to_copy.default, made, dtype=value.dtype))
        if self.soft is not None:
            self._gradient(total, valid, safe, count)

    def _gradient(self, total: fx.Node, valid: fx.Node, safe: fx.Node, count: fx.Node) -> None:
        """(softmax - onehot) * grad, computed from the logits again."""
        soft = self.soft
        assert soft is not None
        nll = soft.args[0]
        assert isinstance(nll, fx.Node)
        grad, reduction = nll.args[0], self.loss.args[3]
        self.forward = False
        w = _Writer(self.graph, soft, soft)
        factor = w(_aten._to_copy.default, grad, dtype=torch.float32)
        if reduction == _MEAN:
            factor = w(_aten.div.Tensor, factor, count)
        if not reduction:
            factor = w(_aten.unsqueeze.default, factor, 1)
        else:
            factor = w(_aten.expand.default, factor, _value(total).shape)  # type: ignore[union-attr]
        factor = w(_aten.where.self, valid, factor, w(_aten.full_like.default, factor, 0.0))
        wide = self._wide(w, float("-inf"))
        chance = w(_aten.exp.default, w(_aten.sub.Tensor, wide, total))
        here = w(_aten.eq.Tensor, self._line(w), safe)
        less = w(_aten.sub.Tensor, chance, w(_aten.full_like.default, chance, 1.0))
        made = w(_aten.mul.Tensor, w(_aten.where.self, here, less, chance), factor)
        wanted = _value(soft)
        assert wanted is not None
        made = w(_aten._to_copy.default, made, dtype=wanted.dtype)
        if self.padded is not None:
            whole, classes = made, wanted.shape[1]
            made = w(_aten.slice.Tensor, whole, 1, 0, classes)
            soft.replace_all_uses_with(made)
            _drop_pads(made, whole)
        else:
            soft.replace_all_uses_with(made)

    def _line(self, w: _Writer) -> fx.Node:
        """The numbers of the classes [1, C]."""
        value = _value(self.padded or self.node.args[0])
        assert value is not None
        # Each half counts for itself: one range for both would be kept from one to the other.
        counts = (value.shape[1],) if self.forward else (0, value.shape[1])
        made = _aten.arange.default if self.forward else _aten.arange.start
        line = w(made, *counts, device=value.device)
        return w(_aten.unsqueeze.default, line, 0)

    def _wide(self, w: _Writer, rest: float) -> fx.Node:
        """The logits in float32; `rest` where a padded product has no classes."""
        if self.padded is None:
            return w(_aten._to_copy.default, self.node.args[0], dtype=torch.float32)
        wide = w(_aten._to_copy.default, self.padded, dtype=torch.float32)
        value = _value(self.node.args[0])
        assert value is not None
        inside = w(_aten.lt.Scalar, self._line(w), value.shape[1])
        return w(_aten.where.self, inside, wide, w(_aten.full_like.default, wide, rest))


def _padded_source(logits: Any) -> fx.Node | None:
    """The product [N, W] with columns of padding of which the logits [N, C] are a view, if so.

    Reading it whole keeps loads and stores whole vectors.
    """
    wanted = _value(logits)
    node = logits
    while isinstance(node, fx.Node) and node.target in (_aten.view.default, _aten.reshape.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not _aten.slice.Tensor or wanted is None:
        return None
    source, value = _value(node.args[0]), _value(node)
    whole = node.args[1:3] == (1, 0) and value is not None and value.shape == wanted.shape
    if not whole or source is None or source.dim() != 2 or source.shape[0] != wanted.shape[0]:
        return None
    found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def _drop_pads(part: fx.Node, whole: fx.Node) -> None:
    """Pads of `part`, through views of it, that give `whole` back, whose padding is zeros."""
    wanted, size = _value(part), _value(whole)
    pending = [part]
    while pending:
        node = pending.pop()
        for user in list(node.users):
            if user.target in (_aten.view.default, _aten.reshape.default):
                pending.append(user)
            elif user.target is _aten.constant_pad_nd.default:
                value, source = _value(user), _value(node)
                same = source is not None and wanted is not None and source.shape == wanted.shape
                if same and value is not None and size is not None and value.shape == size.shape:
                    user.replace_all_uses_with(whole)


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
    a, b = _value(left), _value(right)
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
    w = _Writer(graph, node, node)
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
        value = _value(source)
        turned = node.target is not _aten.permute.default or list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
        if isinstance(source, fx.Node) and value is not None and value.dim() == 2 and turned:
            inner = _padded(graph, user, source, more[::-1], made)
            return _Writer(graph, user, user)(_aten.permute.default, inner, [1, 0])
    key = (node, tuple(more))
    if key not in made:
        # Right after what it pads: a later product of the other half may read it as well.
        place = node.next
        while place.op == "placeholder":
            place = place.next
        like = node if node.op == "call_function" else user
        rows, columns = more
        made[key] = _Writer(graph, place, like)(
            _aten.constant_pad_nd.default, node, [0, columns, 0, rows], 0.0
        )
    return made[key]
