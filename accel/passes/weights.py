"""Finding weights that feed contractions, and swapping them for an encoded form.

Compression is data plus a decode op. A lossy weight pass answers one question, `encode`: which
tensors stand for this weight, and which ops turn them back into it. The rest is the same for all
formats and lives here:

* `find_weights` walks from every floating constant through permutes, reshapes and decode ops to the
  contractions that read it, and says which axes of the *stored* tensor are summed over. So the
  values of an already sparsified weight are a weight again, and passes compose;
* a weight is encoded as a matrix [outputs, inputs], whatever its place in conv or matmul: rows are
  outputs, and groups and patterns run along the last axis;
* a table read by `embedding` is decoded after the lookup, so a tied table is stored once and only
  the rows that are read get decoded;
* what was replaced is dropped from the weight store, and bytes and error go to the ledger's notes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.builder import Builder
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module, Op, Value, constant_name
from accel.ir.op import Trait
from accel.ir.ops.shape import permutation_inverse
from accel.ir.storage import WeightStore
from accel.ir.types import SUB_BYTE_BITS, TensorType
from accel.passes.base import Context, Contract, Pass

# Which axes of an operand an op sums over, by op and operand index, for an operand of this rank.
# A contraction without a row here is never touched, and is reported as a near miss.
_CONTRACTED: dict[tuple[str, int], Callable[[int], tuple[int, ...]]] = {
    ("linear", 1): lambda rank: (1,),
    ("expert_linear", 1): lambda rank: (2,),
    ("matmul", 0): lambda rank: (rank - 1,),
    ("matmul", 1): lambda rank: (rank - 2,),
    ("conv", 1): lambda rank: tuple(range(1, rank)),
    ("conv_transpose", 1): lambda rank: (0, *range(2, rank)),
}


@dataclass(frozen=True)
class Use:
    """One contraction's reading of a weight: `op` takes it, through `path`, as `operand`.

    `contracted` are the axes of the stored tensor that the contraction sums over, ascending.
    """

    op: Op
    operand: int
    contracted: tuple[int, ...]
    path: tuple[Op, ...] = ()


@dataclass
class WeightSite:
    """A stored weight and everything in the module that reads it.

    A name may have several `constants` (prefill and decode functions, say): all are replaced, and
    the data is stored once. `lookups` are embeddings that read it as their table; `others` are
    readers that are neither (or that mix output and input axes on the way to a contraction).
    """

    name: str
    type: TensorType
    constants: list[Op] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    lookups: list[Op] = field(default_factory=list)
    others: list[Op] = field(default_factory=list)

    @property
    def contracted(self) -> tuple[int, ...]:
        return self.uses[0].contracted if self.uses else (self.type.rank - 1,)

    @property
    def readers(self) -> list[Op]:
        return [*(u.op for u in self.uses), *self.lookups, *self.others]

    def matches(self, pattern: str, weights: WeightStore) -> bool:
        """Whether the regular expression finds the weight's name or a reader's module path."""
        scopes = {op.location.scope for op in self.readers if op.location is not None}
        names = {self.name, weights.origin(self.name), *scopes}
        return any(re.search(pattern, name) for name in names if name)


@dataclass(frozen=True)
class MatrixForm:
    """A tensor as a matrix: output axes first, then the contracted ones, each flattened."""

    shape: tuple[int, ...]
    contracted: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        rest = tuple(i for i in range(len(self.shape)) if i not in self.contracted)
        return rest + self.contracted

    @property
    def columns(self) -> int:
        return math.prod(self.shape[i] for i in self.contracted)

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // max(self.columns, 1)

    def to_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order).reshape(self.rows, self.columns)

    def from_matrix(self, b: Builder, matrix: Value) -> Value:
        """Emits the ops that give the matrix its weight's shape; none where it has it."""
        permuted = b.reshape_to(matrix, tuple(self.shape[i] for i in self.order))
        if self.order == tuple(range(len(self.shape))):
            return permuted
        result: Value = b.permute(permuted, axes=permutation_inverse(self.order))
        return result


@dataclass(frozen=True)
class Part:
    """A stored tensor of an encoding. Row i of a `per_row` part belongs to row i of the weight."""

    name: str
    per_row: bool = True


@dataclass(frozen=True)
class Encoding:
    """What stands for a matrix: stored parts, and the ops that decode them along the last axis."""

    parts: tuple[Part, ...]
    decode: Callable[[Builder, Sequence[Value]], Value]

    def nbytes(self, weights: WeightStore, counted: set[str]) -> int:
        """Stored bytes of the parts that are not `counted` yet (codebooks may be shared)."""
        fresh = [part.name for part in self.parts if part.name not in counted]
        counted.update(fresh)
        return sum(int(weights.type(name).nbytes()) for name in fresh)

    def emit(self, b: Builder, weights: WeightStore) -> Value:
        """Constants and decode ops for the whole matrix."""
        return self.decode(b, [b.constant(p.name, weights.type(p.name)) for p in self.parts])

    def emit_lookup(self, b: Builder, weights: WeightStore, indices: Value) -> Value:
        """The decoded rows `indices`: the parts are looked up, then decoded."""
        values = []
        for part in self.parts:
            constant = b.constant(part.name, weights.type(part.name))
            if part.per_row:
                # Only stored tensors are packed: values of the program have whole bytes.
                if constant.dtype in SUB_BYTE_BITS:
                    signed = not str(constant.dtype).startswith("torch.uint")
                    constant = b.cast(constant, dtype=torch.int8 if signed else torch.uint8)
                constant = b.embedding(constant, indices)
            values.append(constant)
        return self.decode(b, values)

    def decoded(self, weights: WeightStore) -> Tensor:
        """The matrix that the decode ops give, by the interpreter."""
        function = Function("decode")
        b = Builder(function.body)
        b.op("return", (self.emit(b, weights),))
        return interpret(function, (), weights)[0]


def find_weights(module: Module) -> list[WeightSite]:
    """Every stored floating weight of two or more axes, with its readers, in program order."""
    sites: dict[str, WeightSite] = {}
    for function in module.functions.values():
        for op in function.ops:
            if op.name != "constant" or op.result.type.rank < 2 or not op.result.type.is_static:
                continue
            if not op.result.dtype.is_floating_point:
                continue
            name = str(op.attributes["name"])
            site = sites.setdefault(name, WeightSite(name, op.result.type))
            site.constants.append(op)
            _find_readers(op.result, (), site)
    return list(sites.values())


def _find_readers(value: Value, path: tuple[Op, ...], site: WeightSite) -> None:
    for op, operand in value.uses:
        row = _CONTRACTED.get((op.name, operand))
        if row is not None:
            axes: tuple[int, ...] | None = row(value.type.rank)
            for step in reversed(path):
                axes = None if axes is None else _axes_before(step, axes)
            if axes is None:
                site.others.append(op)
            else:
                site.uses.append(Use(op, operand, tuple(sorted(axes)), path))
        elif operand == 0 and op.name in ("permute", "reshape", "unpack_n_of_m"):
            _find_readers(op.result, (*path, op), site)
        elif op.name == "embedding" and operand == 0 and not path:
            site.lookups.append(op)
        else:
            site.others.append(op)


def _axes_before(op: Op, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Axes of op's first operand that become `axes` of its result; None if others mix in."""
    if op.name == "permute":
        order = op.attribute("axes")
        return tuple(order[i] for i in axes)
    if op.name == "unpack_n_of_m":
        return axes if op.result.type.rank - 1 in axes else None
    found: list[int] = []
    for sources, targets in _reshape_groups(op.operands[0].shape, op.result.shape):
        inside = {i in axes for i in targets if op.result.shape[i] != 1}
        if len(inside) > 1:
            return None
        if inside == {True}:
            found.extend(sources)
    return tuple(found)


def _reshape_groups(source: Sequence[Any], target: Sequence[Any]) -> Iterator[tuple[range, range]]:
    """Smallest runs of source and target axes with equal products."""
    i = j = 0
    while i < len(source) or j < len(target):
        first_i, first_j, left, right = i, j, 1, 1
        if i < len(source):
            left, i = source[i], i + 1
        if j < len(target):
            right, j = target[j], j + 1
        while left != right:
            if (left < right and i < len(source)) or j == len(target):
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        yield range(first_i, i), range(first_j, j)


@dataclass
class WeightSelection(Pass):
    """Base of the lossy weight passes: which weights they touch.

    Options:
        skip: a regular expression; weights whose name (or a reader's module path) it finds stay.
        only: a regular expression; other weights stay. Empty: all.
        bound: the relative error of the results that the pass promises; none: `default_bound`.
    """

    skip: str = ""
    only: str = ""
    bound: float | None = None

    def __post_init__(self) -> None:
        for option in ("skip", "only"):
            try:
                re.compile(getattr(self, option))
            except re.error as error:
                raise OptionError(
                    f"{self.name}: {option} is not a regular expression: {error}"
                ) from error

    def default_bound(self) -> float:
        """What these options promise when the user asks for no `bound`."""
        return self.contract.bound

    def promise(self) -> Contract:
        bound = self.default_bound() if self.bound is None else self.bound
        return dataclasses.replace(self.contract, bound=bound)

    def chosen(self, module: Module) -> list[WeightSite]:
        """The weights that `skip` and `only` leave."""
        return [
            site
            for site in find_weights(module)
            if not (self.skip and site.matches(self.skip, module.weights))
            and not (self.only and not site.matches(self.only, module.weights))
        ]


@dataclass
class WeightPass(WeightSelection):
    """Base of the passes that encode stored weights and write a decode op: options and walk.

    Options (besides those of `WeightSelection`):
        tied: what to do with a weight that something besides contractions reads, such as an
            embedding table that is also the output projection. "keep" leaves it alone and reports
            a miss; "share" encodes it once and every reader decodes (an embedding after its
            lookup); "split" encodes it for the contractions and keeps the dense one for the rest.
        embeddings: also encode tables that only embeddings read.
    """

    tied: Literal["keep", "share", "split"] = "keep"
    embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option(self, "tied", ("keep", "share", "split"))

    @abstractmethod
    def encode(self, matrix: Tensor, name: str, weights: WeightStore) -> Encoding:
        """Stores the parts of `matrix` [outputs, inputs] under names that start with `name`."""

    def refuse(self, site: WeightSite, form: MatrixForm, tensor: Tensor) -> str:
        """Why this weight cannot be encoded (the near miss); empty if it can."""
        return ""

    def run(self, module: Module, context: Context) -> None:
        rows: list[dict[str, Any]] = []
        counted: set[str] = set()
        for site in self.select(module, context):
            tensor = module.weights.tensor(site.name)
            form = MatrixForm(tuple(tensor.shape), site.contracted)
            reason = "" if bool(torch.isfinite(tensor).all()) else "it has infinities or NaNs"
            reason = reason or self.refuse(site, form, tensor)
            if reason:
                context.miss(self.name, site.constants[0], f"weight '{site.name}': {reason}")
                continue
            if not context.rewrite(self.name, site.constants[0]):
                break
            matrix = form.to_matrix(tensor)
            encoding = self.encode(matrix, site.name, module.weights)
            self._replace(site, form, encoding, module)
            rows.append(
                {
                    "weight": site.name,
                    "bytes_before": int(site.type.nbytes()),
                    "bytes_after": encoding.nbytes(module.weights, counted),
                    "error": relative_error(encoding.decoded(module.weights), matrix),
                }
            )
        drop_unused(module, [row["weight"] for row in rows])
        note_weights(context, rows)

    def select(self, module: Module, context: Context) -> Iterator[WeightSite]:
        """The weights that the options choose; near misses are reported."""
        for site in self.chosen(module):
            if not site.uses and not (self.embeddings and site.lookups):
                for op in site.others:
                    if op.has(Trait.CONTRACTION):
                        context.miss(self.name, op, f"'{site.name}' is no plain weight of it")
                continue
            rest = [*site.lookups, *site.others] if site.uses else site.others
            if rest and self.tied == "keep":
                names = ", ".join(sorted({f"accel.{op.name}" for op in rest}))
                context.miss(
                    self.name,
                    rest[0],
                    f"weight '{site.name}' is also read by {names} "
                    f"({self.name}{{tied=share}} or {{tied=split}} encodes it)",
                )
                continue
            yield site

    def _replace(
        self, site: WeightSite, form: MatrixForm, encoding: Encoding, module: Module
    ) -> None:
        split = self.tied == "split" and bool(site.uses)
        if not split:
            for op in site.lookups:
                b = Builder(before=op, made_by=self.name)
                op.replace_with([encoding.emit_lookup(b, module.weights, op.operands[1])])
        for constant in site.constants:
            if not constant.result.uses:
                constant.erase()
                continue
            b = Builder(before=constant, made_by=self.name)
            dense = form.from_matrix(b, encoding.emit(b, module.weights))
            if not split:
                constant.replace_with([dense])
                continue
            for op, operand in list(constant.result.uses):
                heads = {(u.path[0], 0) if u.path else (u.op, u.operand) for u in site.uses}
                if (op, operand) in heads:
                    op.set_operand(operand, dense)


def check_option(owner: Pass, option: str, allowed: Sequence[Any]) -> None:
    """OptionError unless the option's value is one of `allowed`."""
    value = getattr(owner, option)
    if value not in allowed:
        raise OptionError(
            f"{owner.name}: {option} = {value!r}",
            advice=f"one of {', '.join(map(str, allowed))}",
        )


def positive_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype they are stored in; 1 where a group is all zeros (or rounds to it)."""
    rounded = scale.to(dtype)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def drop_unused(module: Module, names: Sequence[str]) -> None:
    """Removes those of `names` from the weight store that no op reads any more."""
    read = {str(op.attributes["name"]) for op in module.walk() if op.name == "constant"}
    for name in dict.fromkeys(names):
        if name not in read and name in module.weights:
            module.weights.remove(name)


def note_weights(context: Context, rows: Sequence[dict[str, Any]]) -> None:
    """Leaves rows (weight, bytes_before, bytes_after, error) and their sums for the ledger."""
    context.notes["weights"] = list(rows)
    context.notes["bytes_before"] = sum(row["bytes_before"] for row in rows)
    context.notes["bytes_after"] = sum(row["bytes_after"] for row in rows)


def relative_error(made: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`; 0 for equal tensors."""
    difference = torch.linalg.vector_norm(made.double() - wanted.double())
    norm = torch.linalg.vector_norm(wanted.double())
    return float(difference / norm) if float(norm) else float(difference)


def stored_constant(value: Value, module: Module) -> Tensor | None:
    """The tensor of a floating `accel.constant`, else None."""
    name = constant_name(value)
    if name is None or not value.dtype.is_floating_point:
        return None
    return module.weights.tensor(name)
