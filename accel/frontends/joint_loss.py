"""Cross-entropies of a joint graph, rewritten before it is cut in two.

`fuse_cross_entropy`: log-softmax and nll-loss with their gradients become a logsumexp a row and one
elementwise gradient: no tensor over all classes but the logits is made in float32.

Where the loss is one number and the gradient for the logits is read by products alone, the forward
computes that gradient for a loss whose own gradient is 1, in the kernel that has the logits at
hand: they are read and written once in all. The backward multiplies what the products make, or
their other operand, by the loss's gradient, whichever is smaller. (float16 would lose what a scaled
loss keeps, so it goes the other way: logits and a logsumexp a row are kept, and the backward
computes the gradient from them.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from accel.frontends.joint_writer import Writer, value_of

_aten = torch.ops.aten
_MEAN = 1

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
    value = value_of(x)
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
        w = Writer(self.graph, self.loss, self.loss)
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
            value = value_of(node)
            assert value is not None
            if made is count and not reduction:
                made = w(_aten.mul.Tensor, count, 0.0)
            node.replace_all_uses_with(w(_aten._to_copy.default, made, dtype=value.dtype))
        if self.soft is None:
            return
        readers = _products(self.soft) if reduction else None
        if readers is None:
            self._gradient_later(total, valid, safe, count)
        else:
            self._gradient_now(w, wide, total, valid, safe, count, readers)

    def _gradient_now(
        self,
        w: Writer,
        wide: fx.Node,
        total: fx.Node,
        valid: fx.Node,
        safe: fx.Node,
        count: fx.Node,
        readers: list[_Reader],
    ) -> None:
        """The gradient of a loss whose own is 1, in the forward; products are scaled instead."""
        assert self.soft is not None
        own = self.soft.args[0].args[0]  # type: ignore[union-attr]
        factor = w(_aten.full_like.default, count, 1.0)
        if self.loss.args[3] == _MEAN:
            factor = w(_aten.div.Tensor, factor, count)
        factor = w(_aten.expand.default, factor, _shape(total))
        made = self._differences(w, wide, total, valid, safe, factor)
        kept = made
        while len(kept.users) == 1 and next(iter(kept.users)).target is _aten._to_copy.default:
            kept = next(iter(kept.users))
        kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        assert isinstance(own, fx.Node)
        for reader in readers:
            reader.scale(self.graph, own)

    def _gradient_later(
        self, total: fx.Node, valid: fx.Node, safe: fx.Node, count: fx.Node
    ) -> None:
        """(softmax - onehot) * grad, computed from the logits again."""
        assert self.soft is not None
        grad, reduction = self.soft.args[0].args[0], self.loss.args[3]  # type: ignore[union-attr]
        self.forward = False
        w = Writer(self.graph, self.soft, self.soft)
        factor = w(_aten._to_copy.default, grad, dtype=torch.float32)
        if reduction == _MEAN:
            factor = w(_aten.div.Tensor, factor, count)
        if not reduction:
            factor = w(_aten.unsqueeze.default, factor, 1)
        else:
            factor = w(_aten.expand.default, factor, _shape(total))
        wide = self._wide(w, float("-inf"))
        self._differences(w, wide, total, valid, safe, factor)

    def _differences(
        self,
        w: Writer,
        wide: fx.Node,
        total: fx.Node,
        valid: fx.Node,
        safe: fx.Node,
        factor: fx.Node,
    ) -> fx.Node:
        """(softmax - onehot) * factor [N, 1], in place of the gradient that the graph had."""
        soft = self.soft
        assert soft is not None
        factor = w(_aten.where.self, valid, factor, w(_aten.full_like.default, factor, 0.0))
        chance = w(_aten.exp.default, w(_aten.sub.Tensor, wide, total))
        here = w(_aten.eq.Tensor, self._line(w), safe)
        less = w(_aten.sub.Tensor, chance, w(_aten.full_like.default, chance, 1.0))
        made = w(_aten.mul.Tensor, w(_aten.where.self, here, less, chance), factor)
        wanted = value_of(soft)
        assert wanted is not None
        made = whole = w(_aten._to_copy.default, made, dtype=wanted.dtype)
        if self.padded is not None:
            made = w(_aten.slice.Tensor, whole, 1, 0, wanted.shape[1])
        soft.replace_all_uses_with(made)
        if self.padded is not None:
            _drop_pads(made, whole)
        return whole

    def _line(self, w: Writer) -> fx.Node:
        """The numbers of the classes [1, C]."""
        value = value_of(self.padded or self.node.args[0])
        assert value is not None
        # Each half counts for itself: one range for both would be kept from one to the other.
        counts = (value.shape[1],) if self.forward else (0, value.shape[1])
        made = _aten.arange.default if self.forward else _aten.arange.start
        line = w(made, *counts, device=value.device)
        return w(_aten.unsqueeze.default, line, 0)

    def _wide(self, w: Writer, rest: float) -> fx.Node:
        """The logits in float32; `rest` where a padded product has no classes."""
        if self.padded is None:
            return w(_aten._to_copy.default, self.node.args[0], dtype=torch.float32)
        wide = w(_aten._to_copy.default, self.padded, dtype=torch.float32)
        value = value_of(self.node.args[0])
        assert value is not None
        inside = w(_aten.lt.Scalar, self._line(w), value.shape[1])
        return w(_aten.where.self, inside, wide, w(_aten.full_like.default, wide, rest))


_MOVES = (
    _aten.view.default, _aten.reshape.default, _aten.permute.default, _aten.t.default,
    _aten.slice.Tensor, _aten.constant_pad_nd.default,
)  # fmt: skip
_WIDE = (torch.bfloat16, torch.float32)  # which hold small numbers as precisely as large ones


@dataclass(frozen=True)
class _Reader:
    """A product, and which of its operands is a gradient."""

    product: fx.Node
    place: int

    def scale(self, graph: fx.Graph, factor: fx.Node) -> None:
        """Multiplies the product's result by a number, or its other operand if that is smaller.

        Where the result is added to something, the addition's kernel multiplies as well.
        """
        other = self.product.args[1 - self.place]
        assert isinstance(other, fx.Node)
        result = _added(self.product)
        if result is not None or _count(self.product) <= _count(other):
            result = result or self.product
            w = Writer(graph, result.next, result)
            readers = list(result.users)
            made = _times(w, result, factor)
            for user in readers:
                user.replace_input_with(result, made)
        else:
            w = Writer(graph, self.product, self.product)
            arguments = list(self.product.args)
            arguments[1 - self.place] = _times(w, other, factor)
            self.product.args = tuple(arguments)


def _added(node: fx.Node) -> fx.Node | None:
    """The last view of a value before it is added to something, if nothing else reads it."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is _aten.add.Tensor:
            return node
        if user.target not in _MOVES:
            return None
        node = user
    return None


def _times(w: Writer, x: fx.Node, factor: fx.Node) -> fx.Node:
    """x * factor, rounded once."""
    value = value_of(x)
    assert value is not None
    wide = w(_aten._to_copy.default, x, dtype=torch.float32)
    number = w(_aten._to_copy.default, factor, dtype=torch.float32)
    return w(_aten._to_copy.default, w(_aten.mul.Tensor, wide, number), dtype=value.dtype)


def _products(gradient: fx.Node) -> list[_Reader] | None:
    """The products that read a gradient as it lies there, turned, cut, padded or rounded; None if
    something else reads it as well."""
    found: list[_Reader] = []
    pending = [gradient]
    while pending:
        node = pending.pop()
        value = value_of(node)
        if value is None or value.dtype not in _WIDE:
            return None
        for user in node.users:
            if user.target in _MOVES or user.target is _aten._to_copy.default:
                pending.append(user)
            elif user.target is _aten.mm.default and user.args[0] is not user.args[1]:
                found.append(_Reader(user, user.args.index(node)))
            else:
                return None
    # Both operands of one product: a number would have to be applied twice.
    return found if found and len({r.product for r in found}) == len(found) else None


def _count(node: fx.Node) -> int:
    value = value_of(node)
    assert value is not None
    return value.numel()


def _shape(node: fx.Node) -> torch.Size:
    value = value_of(node)
    assert value is not None
    return value.shape


def _padded_source(logits: Any) -> fx.Node | None:
    """The product [N, W] with columns of padding of which the logits [N, C] are a view, if so.

    Reading it whole keeps loads and stores whole vectors.
    """
    wanted = value_of(logits)
    node = logits
    while isinstance(node, fx.Node) and node.target in (_aten.view.default, _aten.reshape.default):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not _aten.slice.Tensor or wanted is None:
        return None
    source, value = value_of(node.args[0]), value_of(node)
    whole = node.args[1:3] == (1, 0) and value is not None and value.shape == wanted.shape
    if not whole or source is None or source.dim() != 2 or source.shape[0] != wanted.shape[0]:
        return None
    found = node.args[0]
    return found if isinstance(found, fx.Node) else None


def _drop_pads(part: fx.Node, whole: fx.Node) -> None:
    """Pads of `part`, through views of it, that give `whole` back, whose padding is zeros."""
    wanted, size = value_of(part), value_of(whole)
    pending = [part]
    while pending:
        node = pending.pop()
        for user in list(node.users):
            if user.target in (_aten.view.default, _aten.reshape.default):
                pending.append(user)
            elif user.target is _aten.constant_pad_nd.default:
                value, source = value_of(user), value_of(node)
                same = source is not None and wanted is not None and source.shape == wanted.shape
                if same and value is not None and size is not None and value.shape == size.shape:
                    user.replace_all_uses_with(whole)
