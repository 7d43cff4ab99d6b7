"""Fewer key/value heads: multi-head attention becomes grouped-query or multi-query attention.

The heads of a group become one: the rows of its key and value projections are averaged (Ainslie et
al., 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"),
so that the cache shrinks by the size of a group. Groups are neighbours (`method=mean`), or heads
whose keys and values are alike on calibration inputs (`cluster`: equal groups, grown from the most
similar pair); `best` measures both for each attention and takes the one whose result is nearer.
Query heads are put in the order of their groups, and the results back.

The error is large: it is meant to be healed by a short training (`accel.passes.heal`). Contract:
approximate. Before and after `convert_gqa{heads=1}`:

    %y = "accel.linear"(%x, %w) : (tensor<1x?x32xf32>, tensor<32x32xf32>) ...
    %k = "accel.permute"("accel.reshape"(%y) {shape = [1, s, 4, 8]}) ...
    %o = "accel.attention"(%q, %k, %v) ...             // %v alike

    %w = "accel.constant"() {name = "k.weight.pooled"} : () -> tensor<8x32xf32>
    %y = "accel.linear"(%x, %w) ...
    %k = "accel.permute"("accel.reshape"(%y) {shape = [1, s, 1, 8]}) ...
    %o = "accel.attention"(%q, %k, %v) ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.interpret import interpret
from accel.ir.module import Module, Op, Value, constant_name
from accel.ir.ops.attention import Attention
from accel.ir.types import same_dim
from accel.passes.base import Context, Contract, Pass, approximate, register_pass
from accel.passes.weights import check_option

Groups = list[list[int]]
_METHODS = ("mean", "cluster", "best")
_DEFAULT_BOUND = 1.0


@register_pass
@dataclass
class ConvertGqa(Pass):
    """Merges key/value heads of causal attention.

    Options:
        heads: key/value heads that are left, a divisor of those there are.
        method: "mean" (neighbours), "cluster" (alike on calibration inputs), "best" of both.
        bound: relative error of results to promise.
    """

    name: ClassVar[str] = "convert_gqa"
    contract: ClassVar[Contract] = approximate("relative_error", _DEFAULT_BOUND)

    heads: int = 1
    method: Literal["mean", "cluster", "best"] = "mean"
    bound: float = _DEFAULT_BOUND

    def __post_init__(self) -> None:
        check_option(self, "method", _METHODS)
        if self.heads < 1 or self.bound <= 0:
            raise OptionError(f"{self.name}: heads = {self.heads}, bound = {self.bound}")

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound)

    def run(self, module: Module, context: Context) -> None:
        if self.method != "mean" and not context.calibration:
            raise OptionError(
                f"{self.name}: method = {self.method} measures heads, and there is no calibration",
                advice="pass calibration inputs, or method=mean",
            )
        sites: list[_Site] = []
        for op in module.main.ops:
            if op.name == "attention" and op.attribute("causal"):
                site = _Site(op)
                reason = site.refuse(self.heads)
                if reason:
                    context.miss(self.name, op, reason)
                else:
                    sites.append(site)
        seen = _activations(module, context, sites) if self.method != "mean" else {}
        notes = []
        for site in sites:
            groups, how = self._groups(site, seen.get(site.op))
            if context.rewrite(self.name, site.op):
                site.merge(module, groups)
                notes.append({"place": str(site.op.location or ""), "method": how})
        context.notes["attention"] = notes

    def _groups(self, site: _Site, seen: list[Tensor] | None) -> tuple[Groups, str]:
        share = site.count // self.heads
        near = [list(range(i * share, (i + 1) * share)) for i in range(self.heads)]
        if seen is None:
            return near, "mean"
        alike = cluster(seen[1], seen[2], share)
        if self.method == "cluster" or site.error(alike, seen) < site.error(near, seen):
            return alike, "cluster"
        return near, "mean"


def cluster(keys: Tensor, values: Tensor, share: int) -> Groups:
    """Heads [.., H, S, D] in groups of `share` whose keys and values point the same ways."""

    def alike(x: Tensor) -> Tensor:
        flat = torch.nn.functional.normalize(x.transpose(0, 1).flatten(1).double(), dim=1)
        return flat @ flat.T

    similar = alike(keys) + alike(values)
    left = list(range(similar.shape[0]))
    groups: Groups = []
    while left:
        pairs = [(float(similar[a, b]), a, b) for a in left for b in left if a < b]
        group = list(max(pairs)[1:]) if share > 1 else [left[0]]
        while len(group) < share:
            rest = [h for h in left if h not in group]
            group.append(max(rest, key=lambda h: float(similar[h, group].sum())))
        groups.append(sorted(group))
        left = [h for h in left if h not in group]
    return sorted(groups)


@dataclass
class _Path:
    """From a projection to the heads that attention reads: the ops in between, in order."""

    linear: Op
    cut: Op | None
    ops: list[Op]


class _Site:
    """One attention whose key/value heads may be merged."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.count = op.operands[1].shape[1]
        self.paths = [_path(op.operands[1]), _path(op.operands[2])]

    def refuse(self, heads: int) -> str:
        if not isinstance(self.count, int) or self.count <= heads:
            return f"it has {self.count} key/value heads"
        if self.count % heads:
            return f"{self.count} key/value heads do not make {heads}"
        if any(path is None for path in self.paths):
            return "its keys or values are no projection that is split into heads"
        return ""

    def error(self, groups: Groups, seen: list[Tensor]) -> float:
        """Relative error of the attention's result on q, k, v [B, heads, S, D]."""
        q, k, v = seen
        attributes = self.op.definition.complete_attributes(self.op.attributes)
        wanted = Attention.evaluate(q, k, v, **attributes)
        order, back = self._order(groups)
        pooled = [torch.stack([x[:, g].mean(1) for g in groups], 1) for x in (k, v)]
        got = Attention.evaluate(q[:, order], *pooled, **attributes)[:, back]
        return float((got - wanted).norm() / wanted.norm())

    def _order(self, groups: Groups) -> tuple[list[int], list[int]]:
        """Query heads by group, and where each is then."""
        queries = self.op.operands[0].shape[1]
        assert isinstance(queries, int)
        share = queries // self.count
        order = [h * share + i for group in groups for h in group for i in range(share)]
        return order, sorted(range(queries), key=order.__getitem__)

    def merge(self, module: Module, groups: Groups) -> None:
        op = self.op
        b = Builder(before=op, made_by=ConvertGqa.name)
        for place, path in enumerate(self.paths, 1):
            assert path is not None
            op.set_operand(place, _merged(module, path, groups))
        order, back = self._order(groups)
        if order == list(range(len(order))):
            return
        q, _, _, mask, sinks = op.arguments()
        op.set_operand(0, b.index(q, _indices(module, b, order), axes=(1,)))
        if mask is not None and not same_dim(mask.shape[-3] if mask.type.rank > 2 else 1, 1):
            wide = b.broadcast_to(mask, shape=(*q.shape[:3], mask.shape[-1]))
            op.set_operand(3, b.index(wide, _indices(module, b, order), axes=(1,)))
        if sinks is not None:
            place = len(op.operands) - 1
            op.set_operand(place, b.index(sinks, _indices(module, b, order), axes=(0,)))
        users = list(op.result.uses)
        after = Builder(before=op.next, made_by=ConvertGqa.name)
        made = after.index(op.result, _indices(module, after, back), axes=(1,))
        for user, i in users:
            user.set_operand(i, made)


def _indices(module: Module, b: Builder, order: list[int]) -> Value:
    name = module.weights.add("heads", torch.tensor(order))
    return b.constant(name, module.weights.type(name))


def _path(value: Value) -> _Path | None:
    """linear [B, S, H * D], perhaps a slice of it, split into [B, S, H, D], permuted, rotated."""
    ops: list[Op] = []
    op = value.op
    while op is not None and op.name in ("rope", "cast", "permute", "rms_norm"):
        if op.name == "permute" and op.attribute("axes") != (0, 2, 1, 3):
            return None
        ops.append(op)
        op = op.operands[0].op
    if op is None or op.name != "reshape" or not any(o.name == "permute" for o in ops):
        return None
    count, size = value.shape[1], value.shape[3]
    if op.result.type.rank != 4 or not same_dim(op.operands[0].shape[-1], count * size):
        return None
    ops.append(op)
    cut = None
    op = op.operands[0].op
    if op is not None and op.name == "slice" and op.attribute("step") == 1:
        cut = op if op.attribute("axis") % op.result.type.rank == op.result.type.rank - 1 else None
        op = op.operands[0].op if cut is not None else op
    if op is None or op.name != "linear" or constant_name(op.operands[1]) is None:
        return None
    if any(constant_name(v) is None for v in op.operands[1:]):
        return None
    return _Path(op, cut, ops[::-1])


def _merged(module: Module, path: _Path, groups: Groups) -> Value:
    """The path again, with the rows of each group's heads averaged."""
    first, last = path.ops[0], path.ops[-1]
    b = Builder(before=last, made_by=ConvertGqa.name)
    rows = (0, path.linear.result.shape[-1])
    if path.cut is not None:
        rows = (path.cut.attribute("start"), path.cut.attribute("stop"))
    weights: list[Value] = []
    for operand in path.linear.operands[1:]:
        name = str(constant_name(operand))
        stored = module.weights.tensor(name)
        heads = stored[rows[0] : rows[1]].double().unflatten(0, (-1, first.result.shape[3]))
        pooled = torch.stack([heads[g].mean(0) for g in groups]).flatten(0, 1)
        made = module.weights.add(f"{name}.pooled", pooled.to(stored.dtype), origin=name)
        weights.append(b.constant(made, module.weights.type(made)))
    value: Value = b.linear(path.linear.operands[0], *weights)
    for op in path.ops:
        attributes = dict(op.attributes)
        if op.name == "reshape":
            shape = list(op.result.shape)
            shape[2] = len(groups)
            attributes["shape"] = tuple(shape)
        value = b.op(op.name, [value, *op.operands[1:]], attributes).result
    return value


def _activations(module: Module, context: Context, sites: list[_Site]) -> dict[Op, list[Tensor]]:
    """q, k and v of each attention on the calibration inputs."""
    wanted = {value for site in sites for value in site.op.operands[:3]}
    seen: dict[Value, list[Tensor]] = {value: [] for value in wanted}

    def observe(op: Op, results: object) -> None:
        assert isinstance(results, (list, tuple))
        for value, tensor in zip(op.results, results):
            if value in seen:
                seen[value].append(tensor.float())

    for inputs in context.calibration:
        interpret(module.main, inputs, module.weights, observe=observe)
    return {site.op: [torch.cat(seen[v]) for v in site.op.operands[:3]] for site in sites}
