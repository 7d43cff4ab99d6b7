"""From recorded ATen calls to ops of a function: the machinery around the table.

The table (`accel.frontends.aten`) maps an ATen overload to a function `lower(c, *args, **kwargs)`,
where `c` is the `Importer` and the arguments are the call's own (fake tensors, SymInts, Python
values). It returns the values of the results. For each call, in this order:

1. an in-place overload is its functional twin plus a write (`accel.frontends.aliases`);
2. an overload in the table is lowered;
3. a composite, or an overload PyTorch can decompose, is decomposed by recording it, and its parts
   are imported;
4. anything else becomes a visible `accel.aten`, typed by its fake result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor

from accel.config import logger
from accel.errors import CaptureError, TypeInferenceError
from accel.frontends.aliases import Aliases
from accel.frontends.calls import (
    Call,
    fake_mode_of,
    flat_tensors,
    functional_twin,
    has_complex,
    is_plain,
    normalize,
    results_of,
)
from accel.frontends.scalars import Scalars
from accel.frontends.symbols import Symbols
from accel.frontends.trace import record
from accel.ir.builder import Builder
from accel.ir.module import Function, Location, Module, Value
from accel.ir.types import DTYPE_NAMES, Dim, TensorType, same_shape

Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}
WRITES: dict[str, Lowering] = {}  # overloads that write to operands and are no one's twin
_DEEPEST = 16  # decompositions inside decompositions
_log = logger("frontends")


def lower(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers a lowering for ATen overloads, e.g. `@lower("linear", "add.Tensor")`."""

    def wrap(function: Lowering) -> Lowering:
        for name in names:
            full = name if "::" in name else f"aten::{name}"
            LOWERINGS[full] = function
        return function

    return wrap


def lower_write(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers a lowering that writes operands itself (`Importer.write`), by op name."""

    def wrap(function: Lowering) -> Lowering:
        WRITES.update({f"aten::{name}": function for name in names})
        return function

    return wrap


class Importer:
    """Turns calls into ops at the end of `function`; weights go to `module`.

    Attributes:
        b: the builder, with the current call's location.
        call: the call being lowered.
        fallbacks: how many ops became `accel.aten`, by overload.
        scalars: Python and symbolic numbers as values.
    """

    def __init__(self, function: Function, module: Module, symbols: Symbols) -> None:
        self.function = function
        self.module = module
        self.symbols = symbols
        self.b = Builder(function.body, made_by="import")
        self.aliases = Aliases(self)
        self.call: Call = None  # type: ignore[assignment]
        self.fallbacks: dict[str, int] = {}
        self.scalars = Scalars(self.b, symbols)
        self._constants: dict[int, tuple[Tensor, Value]] = {}
        self._used: set[int] = set()
        self._depth = 0

    # Reading arguments ---------------------------------------------------------------------------

    def __call__(self, tensor: Tensor) -> Value:
        """The current value of a tensor argument."""
        if type(tensor) is not FakeTensor and tensor not in self.aliases:
            return self._real(tensor)
        return self.aliases.read(tensor)

    def dim(self, size: int | torch.SymInt) -> Dim:
        return size if type(size) is int else self.symbols.dim(size)

    def shape(self, sizes: Iterable[int | torch.SymInt]) -> tuple[Dim, ...]:
        return tuple(s if type(s) is int else self.symbols.dim(s) for s in sizes)

    def type(self, tensor: Tensor) -> TensorType:
        """The type of a fake tensor. Raises CaptureError for sparse and other layouts."""
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"a tensor of layout {tensor.layout}",
                where=str(self.location or ""),
                advice="convert it with to_dense() before the compiled part",
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise CaptureError(f"the dtype {tensor.dtype}", where=str(self.location or ""))
        return TensorType(self.shape(tensor.shape), tensor.dtype)

    @property
    def out(self) -> Tensor:
        """The fake result of the current call (the first, if there are several)."""
        result = self.call.result
        if isinstance(result, Tensor):
            return result
        return next(r for r in result if isinstance(r, Tensor))

    @property
    def out_shape(self) -> tuple[Dim, ...]:
        return self.shape(self.out.shape)

    @property
    def out_dtype(self) -> torch.dtype:
        return self.out.dtype

    @property
    def location(self) -> Location | None:
        return self.b.location

    # Constants -----------------------------------------------------------------------------------

    def scalar(self, value: Any, dtype: torch.dtype) -> Value:
        """A Python number, or a symbolic one, as a 0-d value of `dtype`."""
        return self.scalars.value(value, dtype)

    def size(self, dim: Dim) -> Value:
        """A symbolic size as a 0-d int64 value."""
        return self.scalars.size(dim)

    def result(self, leaf: Any) -> Value:
        """A result of the program: a tensor, or a number as a 0-d value."""
        if isinstance(leaf, Tensor):
            return self(leaf)
        kinds = {torch.SymInt: torch.int64, torch.SymFloat: torch.float64}
        return self.scalars.value(leaf, kinds.get(type(leaf), torch.bool))

    def tensor_constant(self, tensor: Tensor, name: str) -> Value:
        """A tensor as a weight; one element becomes a `full`."""
        if tensor.numel() == 1 and not tensor.dtype.is_complex and is_plain(tensor.dtype):
            shape = tuple(tensor.shape)
            result: Value = self.b.full(value=tensor.item(), dtype=tensor.dtype, shape=shape)
            return result
        stored = self.module.weights.add(name, tensor.detach().contiguous())
        return self.b.constant(stored, self.module.weights.type(stored))

    def _real(self, tensor: Tensor) -> Value:
        """A tensor that exists while tracing: a constant of the model's code."""
        found = self._constants.get(id(tensor))
        if found is None:
            value = self.tensor_constant(tensor, "constant")
            found = self._constants[id(tensor)] = (tensor, value)
        return found[1]

    # Calls ---------------------------------------------------------------------------------------

    def is_used(self, tensor: Any) -> bool:
        """Whether a later call, or the program's result, reads this result."""
        return id(tensor) in self._used

    def run(self, calls: Sequence[Call], results: Sequence[Any] = ()) -> None:
        """Imports calls in order; `results` are what is read afterwards.

        Raises CaptureError with the user's file and line.
        """
        self._used.update(id(t) for call in calls for t in flat_tensors(call))
        self._used.update(id(t) for t in results)
        for call in calls:
            self.b.location = call.location
            try:
                self._import(call)
            except CaptureError as error:
                error.where = error.where or str(call.location or "")
                raise
            except TypeInferenceError as error:
                raise CaptureError(
                    f"{call.target} cannot be imported: {error.what}",
                    where=str(call.location or ""),
                ) from error

    def _import(self, call: Call) -> None:
        schema = call.target._schema
        if schema.is_mutable:
            self._import_write(call)
            return
        self._bind(call, self._lower(call))

    def _lower(self, call: Call) -> Any:
        """The values of a call's results: from the table, by parts, or as `accel.aten`."""
        outer, self.call = self.call, call
        try:
            name = call.target.name()
            lowering = LOWERINGS.get(name)
            if has_complex(call) and name not in _COMPLEX_OK:
                return self.fallback(call)
            if lowering is None:
                return self._by_parts(call)
            args, kwargs = normalize(call)
            try:
                result = lowering(self, *args, **kwargs)
            except TypeInferenceError as error:
                _log.debug("%s becomes accel.aten: %s", name, error)
                result = NotImplemented
            return self._by_parts(call) if result is NotImplemented else result
        finally:
            self.call = outer

    def _by_parts(self, call: Call) -> Any:
        target = call.target
        mode = fake_mode_of(call)
        parts: Callable[..., Any] | None = None
        if target._can_decompose():
            parts = target.decompose
        elif target in decomposition_table and target.name() not in _KEEP_WHOLE:
            parts = decomposition_table[target]
        if parts is None or mode is None or self._depth > _DEEPEST:
            return self.fallback(call)
        location = self.b.location
        function = parts

        def body() -> Any:
            made = function(*call.args, **call.kwargs)
            if made is NotImplemented:
                raise NotImplementedError(str(target))
            return made

        try:
            calls, result = record(body, mode, lambda: location)
        except (NotImplementedError, RuntimeError, TypeError, AssertionError) as error:
            _log.debug("%s does not decompose: %s", target, error)
            return self.fallback(call)
        if any(p.target.namespace == "prims" and p.target.name() not in LOWERINGS for p in calls):
            return self.fallback(call)  # nothing would be gained
        tensors = results_of(call)
        made = [result] if isinstance(result, Tensor) else list(result)
        # A factory's result may get another Python object on its way to the model.
        used = [len(made) == 1 or self.is_used(t) for t in tensors]
        wanted = [m for m, u in zip(made, used) if u]
        self._depth += 1
        try:
            self.run(calls, wanted)
        finally:
            self._depth -= 1
            self.b.location = location
        values = [self(m) if u and isinstance(m, Tensor) else None for m, u in zip(made, used)]
        dtypes = [t.dtype if isinstance(t, Tensor) else None for t in tensors]
        return [
            self.b.cast_to(v, d) if v is not None and d is not None else v
            for v, d in zip(values, dtypes)
        ]

    def fallback(self, call: Call) -> list[Value | None]:
        """The visible `accel.aten` for a call."""
        operands: list[Value] = []

        def template(arg: Any) -> Any:
            if isinstance(arg, Tensor):
                operands.append(self(arg))
                return ("operand", len(operands) - 1)
            if isinstance(arg, (list, tuple)):
                return ("list", *(template(a) for a in arg))
            if isinstance(arg, torch.SymInt):
                return self.symbols.dim(arg)
            if isinstance(arg, (torch.SymFloat, torch.SymBool)):
                expr = arg.node.expr
                if not expr.is_number:
                    raise CaptureError(
                        f"{call.target} with the symbolic argument {arg}",
                        where=str(self.location or ""),
                    )
                return float(expr)
            if isinstance(arg, torch.device):
                return str(arg)
            if isinstance(arg, (torch.memory_format, torch.layout)):
                return None  # how elements lie in memory is no part of a program's meaning
            if isinstance(arg, torch.dtype) and arg not in DTYPE_NAMES:
                raise CaptureError(f"the dtype {arg}", where=str(self.location or ""))
            if arg is None or isinstance(arg, (bool, int, float, complex, str, torch.dtype)):
                return arg
            raise CaptureError(
                f"{call.target} with an argument of type {type(arg).__name__}",
                where=str(self.location or ""),
            )

        skip = ("layout", "memory_format", "pin_memory", "generator")
        args = tuple(template(a) for a in call.args)
        kwargs = tuple(
            (k, template(v)) for k, v in call.kwargs.items() if k not in skip and v is not None
        )
        tensors = results_of(call)
        nested = isinstance(call.result, (list, tuple)) and len(tensors) != len(call.result)
        # Sizes among the results are known already; whoever reads them has them.
        allowed = (Tensor, torch.SymInt, int, type(None))
        sizes_only = bool(tensors) and not any(isinstance(t, (Tensor, type(None))) for t in tensors)
        if nested or sizes_only or any(not isinstance(t, allowed) for t in tensors):
            raise CaptureError(
                f"{call.target} returns something else than tensors",
                where=str(self.location or ""),
            )
        name = call.target.name()
        # One without results is there for its errors.
        pure = torch.Tag.nondeterministic_seeded not in call.target.tags and bool(tensors)
        attributes = {"name": name, "args": args, "kwargs": kwargs, "pure": pure}
        types = [self.type(t) for t in tensors if isinstance(t, Tensor)]
        op = self.b.op("aten", operands, attributes, types=types)
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1
        made = iter(op.results)
        return [next(made) if isinstance(t, Tensor) else None for t in tensors]

    def _bind(self, call: Call, values: Any) -> None:
        tensors = results_of(call)
        made = [values] if isinstance(values, Value) or values is None else list(values)
        if values is None:
            made = [None] * len(tensors)
        if len(made) != len(tensors):
            raise CaptureError(f"the lowering of {call.target} made {len(made)} results")
        sources: list[Tensor] | None = None
        for tensor, value in zip(tensors, made):
            if not isinstance(tensor, Tensor):
                continue
            if value is None and self.is_used(tensor) and 0 in tensor.shape:
                value = self.b.full_of(self.shape(tensor.shape), 0, tensor.dtype)
            if value is None:
                continue
            if tensor in self.aliases:
                continue  # an argument returned as it is
            self._check(call, tensor, value)
            if sources is None:
                sources = [a for a in flat_tensors(call) if type(a) is FakeTensor]
            self.aliases.add_result(tensor, value, call, sources)

    def _check(self, call: Call, tensor: Tensor, value: Value) -> None:
        """The lowering's type must be the one that torch says."""
        if value.dtype == tensor.dtype and len(value.shape) == tensor.dim():
            wanted = self.shape(tensor.shape)
            if value.shape == wanted or same_shape(value.shape, wanted):
                return
            if any(not isinstance(d, int) for d in (*value.shape, *wanted)) and all(
                a == b or not (isinstance(a, int) and isinstance(b, int))
                for a, b in zip(value.shape, wanted)
            ):
                return  # symbolic, and not provably different
        raise CaptureError(
            f"{call.target} was imported as {value.type}, but torch says {self.type(tensor)}",
            where=str(call.location or ""),
            advice="this is a defect of accel's importer: please report it",
        )

    # Writes --------------------------------------------------------------------------------------

    def write(self, tensor: Tensor, value: Value) -> None:
        """An in-place change of a tensor: the new value takes its dtype and shape."""
        value = self.b.cast_to(value, tensor.dtype)
        wanted = self.shape(tensor.shape)
        if not same_shape(value.shape, wanted):
            value = self.b.broadcast_to(value, shape=wanted)
        self(tensor)  # a constant of the model's code gets its handle here
        if tensor not in self.aliases:
            self.aliases.add_root(tensor, self(tensor))
        self.aliases.write(tensor, value)

    def _import_write(self, call: Call) -> None:
        special = WRITES.get(call.target._schema.name)
        if special is not None:
            outer, self.call = self.call, call
            args, kwargs = normalize(call)
            values = special(self, *args, **kwargs)
            self.call = outer
            self._bind(call, values)
            return
        twin = functional_twin(call.target)
        if twin is None:
            raise CaptureError(
                f"the in-place operation {call.target}",
                where=str(call.location or ""),
                advice="use its functional form",
            )
        args, kwargs = normalize(call)
        target = args[0]
        pure = Call(twin, args, kwargs, _result_of(twin, call, args, kwargs), call.location)
        made = self._lower(pure)
        value = made if isinstance(made, Value) else made[0]
        self.write(target, value)
        if isinstance(call.result, Tensor) and call.result is not target:
            self.aliases.same(call.result, target)

    # For aliases ---------------------------------------------------------------------------------

    def replay(self, call: Call, tensor: Tensor) -> Value:
        """A view's value over its source's current value."""
        values = self._lower(call)
        if isinstance(values, Value):
            return values
        index = [t is tensor for t in results_of(call)].index(True)
        value = list(values)[index]
        assert isinstance(value, Value)
        return value

    def positions(self, call: Call, shape: tuple[int, ...]) -> Any:
        """A view call run on the numbers of its source's elements."""
        count = 1
        for d in shape:
            count *= d
        numbers = torch.arange(count).reshape(shape)
        first = next(iter(flat_tensors(call)))
        args = [numbers if a is first else a for a in call.args]
        return call.target(*args, **call.kwargs)


def _result_of(
    twin: torch._ops.OpOverload, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the functional twin returns: `half.mul_(single)` is computed in single precision."""
    mode = fake_mode_of(call)
    if mode is None:
        return call.result
    with mode, torch.no_grad():
        return twin(*args, **kwargs)


_COMPLEX_OK = {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::contiguous"}
# Decompositions of these are worse than the op itself run by torch, or lose its meaning.
_KEEP_WHOLE = {
    "aten::soft_margin_loss",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::convolution_backward",
    "aten::_fft_c2c",
}
