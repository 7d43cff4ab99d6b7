"""The only door to TVM: its classes under short names, and builders of straight-line code.

Generated kernels are TVM `PrimFunc`s of plain loops over flat buffers. LLVM vectorizes the scalar
loops; vectors are written by hand only where it would choose the wrong loop (`vector`). A `Block`
collects the statements of one loop body; `let` names a value, so that shared subexpressions are
computed once and the printed source reads like a program.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeAlias

from accel.errors import MissingDependencyError


class _Door:
    """A module of TVM, imported when code is first generated: a compile whose kernels are all in
    the cache does without, which saves a second."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        try:
            module = importlib.import_module(self._name)
        except ImportError as error:  # pragma: no cover - depends on the installation
            raise MissingDependencyError(
                "generated CPU kernels need apache-tvm",
                advice="pip install 'accel-compiler[tvm]'",
            ) from error
        value = getattr(module, attribute)
        setattr(self, attribute, value)
        return value


tvm: Any = _Door("tvm")
tirx: Any = _Door("tvm.tirx")
types: Any = _Door("tvm.ir")

Expr: TypeAlias = Any  # tvm.ir.Expr: the package ships without type stubs
Var: TypeAlias = Any
Buffer: TypeAlias = Any
Statement: TypeAlias = Any


def i64(value: int) -> Expr:
    return tirx.const(value, "int64")


def f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def const(value: bool | int | float, dtype: str) -> Expr:
    return tirx.const(value, dtype)


def dtype_of(value: Expr) -> str:
    return str(value.ty.dtype)


def var(name: str, dtype: str = "int64") -> Var:
    return tirx.Var(name, dtype)


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """Both sides are computed; keep out of reach what must not be (see `guarded`)."""
    return tirx.Select(condition, yes, no)


def eq(a: Expr, b: Expr) -> Expr:
    """a == b. Of conditions too, which TVM's own EQ compares as floats."""
    if dtype_of(a) == "bool":
        return tirx.Or(tirx.And(a, b), tirx.And(tirx.Not(a), tirx.Not(b)))
    return tirx.EQ(a, b)


def ne(a: Expr, b: Expr) -> Expr:
    """True where either is NaN: LLVM's code for TVM's own NE compares ordered."""
    return tirx.Not(eq(a, b))


def is_nan(value: Expr) -> Expr:
    return tirx.isnan(value)


def bits(value: Expr, dtype: str) -> Expr:
    """The same bits as another dtype of the same width."""
    return tirx.reinterpret(dtype, value)


def cast(value: Expr, dtype: str) -> Expr:
    return value if dtype_of(value) == dtype else tirx.Cast(dtype, value)


def extern(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of a C library function without side effects."""
    return tirx.call_pure_extern(dtype, name, *args)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    """An LLVM intrinsic that vectorizes."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def prefetch(block: Block, buffer: Buffer, place: Expr) -> None:
    """Asks for the line of an element, into the second-level cache; never faults.

    Also for what is read once: with the hint that says so, lines go past the second-level cache on
    Intel's CPUs, and a stream ran at a fifth of the memory's rate (Xeon with AMX).
    """
    address = tirx.address_of(load(buffer, place))
    hint = [tirx.const(v, "int32") for v in (0, 2, 1)]  # to read, locality, data
    call = tirx.call_llvm_intrin("void", "llvm.prefetch", address, *hint)
    block.statements.append(tirx.Evaluate(call))


class Block:
    """Statements of one loop body, in order."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []

    def let(self, value: Expr, name: str = "v") -> Expr:
        """Names a value. Constants and names stay as they are.

        Numbers are named by a local cell, not by TVM's `Bind`: its analyzer substitutes bound
        values into each other, which takes time exponential in the length of a computation. Of
        whole numbers only those that are chosen (clamped places) grow like that.
        """
        if isinstance(value, (tirx.Var, tirx.IntImm, tirx.FloatImm)):
            return value
        if dtype_of(value) in ("int64", "bool") and not isinstance(value, tirx.Select):
            variable = tirx.Var(name, value.ty)
            self.statements.append(tirx.Bind(variable, value))
            return variable
        return self.cell(value, name)

    def cell(self, value: Expr, name: str = "v") -> Expr:
        """Names a value by a local cell, whatever its type: for long chains of integers."""
        dtype = dtype_of(value)
        cell = local_array(name, 1, dtype)
        self.statements.append(tirx.AllocBuffer(cell))
        self.store(cell, value, i64(0))
        return tirx.BufferLoad(cell, [i64(0)])

    def store(self, buffer: Buffer, value: Expr, *index: Expr) -> None:
        self.statements.append(tirx.BufferStore(buffer, value, list(index)))

    def loop(self, variable: Var, extent: Expr, body: Block, begin: Expr | None = None) -> None:
        """Runs `body` for variable = begin (0), ..., begin + extent - 1."""
        if not body.statements:
            return
        first = i64(0) if begin is None else begin
        self.statements.append(
            tirx.For(variable, first, extent, tirx.ForKind.SERIAL, body.statement())
        )

    def branch(self, condition: Expr, yes: Block, no: Block | None = None) -> None:
        other = no.statement() if no is not None else None
        self.statements.append(tirx.IfThenElse(condition, yes.statement(), other))

    def allocate(self, buffer: Buffer) -> None:
        self.statements.append(tirx.AllocBuffer(buffer))

    def statement(self) -> Statement:
        if not self.statements:
            return tirx.Evaluate(i64(0))
        if len(self.statements) == 1:
            return self.statements[0]
        return tirx.SeqStmt(self.statements)


def local_array(name: str, length: int, dtype: str) -> Buffer:
    return tirx.decl_buffer((length,), dtype, name, scope="local")


def load(buffer: Buffer, *index: Expr) -> Expr:
    return tirx.BufferLoad(buffer, list(index))


def vector(buffer: Buffer, start: Expr, lanes: int) -> Expr:
    """`lanes` elements that lie side by side."""
    return tirx.BufferLoad(buffer, [lanes_from(start, lanes)])


def lanes_from(start: Expr, lanes: int) -> Expr:
    """The places of a vector's elements, which lie side by side."""
    return tirx.Ramp(start, i64(1), lanes)


def sum_of_lanes(block: Block, value: Expr, lanes: int) -> Expr:
    """The sum of a vector's elements, pairwise; `lanes` is a power of two."""
    while lanes > 1:
        lanes //= 2
        whole = block.cell(value, "sums")
        low, high = (
            tirx.Shuffle([whole], [tirx.const(i + start, "int32") for i in range(lanes)])
            for start in (0, lanes)
        )
        value = low + high
    return value


def element_type(buffer: Buffer) -> str:
    return str(buffer.dtype)
