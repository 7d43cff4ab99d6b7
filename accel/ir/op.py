"""Operation definitions: one place for all there is to know about an op.

A definition is a class with up to four static methods whose *Python signatures are the op's
signature*: positional parameters are operands, keyword-only parameters are attributes.

    @define("softmax", REDUCTION)
    class Softmax:
        \"\"\"exp(x - max) / sum over `axis`.\"\"\"

        @staticmethod
        def infer(x: TensorType, *, axis: int) -> TensorType:
            normalize_axis(axis, x.rank)
            return x

        @staticmethod
        def evaluate(x: Tensor, *, axis: int) -> Tensor:
            return torch.softmax(x, axis)

        @staticmethod
        def decompose(b: Builder, x: Value, *, axis: int) -> Value: ...

`x: TensorType | None = None` is an optional operand and `*xs: TensorType` a variadic one; an
attribute with a default may be left out of the text. Printing, parsing, verification, the
interpreter, the op sweep and the docs page are derived from this.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.errors import AccelError, OptionError, TypeInferenceError
from accel.ir.aten import Arg, Aten, AtenCall, Lit, aten, resolve_overload
from accel.ir.attributes import Attribute, attribute_check, attributes_key
from accel.ir.types import TensorType

__all__ = [
    "Arg",
    "Aten",
    "AtenCall",
    "Attribute",
    "AttributeSpec",
    "Lit",
    "OpDefinition",
    "OperandSpec",
    "Trait",
    "aten",
    "define",
    "definition",
    "definitions",
    "has_definition",
    "resolve_overload",
]


class Trait(enum.Flag):
    """What passes may ask of an op. They never keep lists of op names."""

    NONE = 0
    PURE = enum.auto()  # no effect but its results; may be removed, merged, moved
    ELEMENTWISE = enum.auto()  # output element i depends on input elements i (after broadcasting)
    COMMUTATIVE = enum.auto()  # the first two operands may be swapped
    REDUCTION = enum.auto()  # combines elements along an axis
    VIEW = enum.auto()  # moves elements, computes none; an index map of its first operand
    RANDOM = enum.auto()  # draws from a random state (never merged)
    CONSTANT = enum.auto()  # no operands, value known at compile time
    COMPOSITE = enum.auto()  # keeps meaning; has a decomposition into primitives
    CONTRACTION = enum.auto()  # multiplies and sums: matmul, conv, attention
    DECODE = enum.auto()  # turns stored compressed weights into a dense tensor
    UPDATE = enum.auto()  # the first operand with a part replaced: may happen in its memory
    BITS = enum.auto()  # reads the bits of its operands: never evaluated in a wider dtype
    OPAQUE = enum.auto()  # typed from outside: `accel.aten`, kernels and calls
    TERMINATOR = enum.auto()


@dataclass(frozen=True, slots=True)
class OperandSpec:
    name: str
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """An attribute's name and annotation, with its default if it may be left out."""

    name: str
    annotation: str
    default: Any = inspect.Parameter.empty

    def accepts(self, value: Any) -> bool:
        return attribute_check(self.annotation)(value)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(eq=False)
class OpDefinition:
    """Everything known about one op. Made by `define`; looked up with `definition(name)`."""

    name: str
    traits: Trait
    operands: tuple[OperandSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    infer: Callable[..., TensorType | Sequence[TensorType]] | None
    evaluate: Callable[..., Any] | None
    decompose: Callable[..., Any] | None
    calls: tuple[Aten, ...]
    doc: str
    group: str = ""
    _inferred: dict[Any, tuple[TensorType, ...]] = field(default_factory=dict, repr=False)

    def has(self, trait: Trait) -> bool:
        return bool(self.traits._value_ & trait._value_)

    @property
    def aten(self) -> Aten | None:
        """The ATen form, if one overload computes the op for all operands and attributes."""
        return self.calls[0] if len(self.calls) == 1 and self.calls[0].when is None else None

    def aten_call(self, arguments: Sequence[Any], attributes: Mapping[str, Any]) -> AtenCall | None:
        """The one ATen overload that computes this op for these arguments; None if there is none.

        `arguments` are tensors or IR values, grouped as by `group_operands`; `attributes` are
        complete. The overload differs by case for some ops (`max_pool` of 1, 2 and 3 axes).
        """
        values: dict[str, Any] = dict(attributes)
        for i, spec in enumerate(self.operands):
            values[spec.name] = list(arguments[i:]) if spec.variadic else arguments[i]
        for form in self.calls:
            if form.when is None or form.when(values):
                return AtenCall(form.overload, *form.bind(values))
        return None

    @functools.cached_property
    def needs_segments(self) -> bool:
        """Whether operand groups cannot be told apart by their number alone."""
        return sum(o.optional or o.variadic for o in self.operands) > 1

    def default_segments(self, count: int) -> tuple[int, ...]:
        """Sizes of the groups for `count` operands: optional ones are given from the left."""
        required = sum(not (o.optional or o.variadic) for o in self.operands)
        spare, taken = count - required, 0
        sizes: list[int] = []
        for o in self.operands:
            if o.variadic:
                sizes.append(spare)
            elif o.optional:  # given from the left: older text has no later ones
                sizes.append(min(max(spare - taken, 0), 1))
                taken += sizes[-1]
            else:
                sizes.append(1)
        if spare < 0 or sum(sizes) != count:
            raise TypeInferenceError(
                f"accel.{self.name} takes {len(self.operands)} operands, got {count}"
            )
        return tuple(sizes)

    def group_operands(self, operands: Sequence[Any], segments: tuple[int, ...] | None) -> list:
        """Arguments for `infer`/`evaluate`/`decompose`: None for a missing optional operand.

        A variadic group is spliced in place: it is always the last one.
        """
        sizes = segments if segments is not None else self.default_segments(len(operands))
        if (
            len(sizes) != len(self.operands)
            or sum(sizes) != len(operands)
            or any(size < 0 for size in sizes)
        ):
            raise TypeInferenceError(
                f"accel.{self.name}: operand_segments {sizes} do not fit {len(operands)} operands"
            )
        result: list[Any] = []
        position = 0
        for spec, size in zip(self.operands, sizes):
            if spec.variadic:
                result.extend(operands[position : position + size])
            elif size > 1 or (size == 0 and not spec.optional):
                raise TypeInferenceError(
                    f"accel.{self.name}: operand '{spec.name}' has {size} values"
                )
            else:
                result.append(operands[position] if size else None)
            position += size
        return result

    def complete_attributes(self, given: Mapping[str, Attribute]) -> dict[str, Any]:
        """The given attributes with defaults filled in; unknown or missing ones are errors."""
        result: dict[str, Any] = {}
        missing = ""
        found = 0
        for spec in self.attributes:
            if spec.name in given:
                found += 1
                result[spec.name] = given[spec.name]
            else:
                missing = missing or (spec.name if spec.required else "")
                result[spec.name] = spec.default
        if found < len(given):
            name = next(n for n in given if n not in result)
            raise TypeInferenceError(
                f"accel.{self.name} has no attribute '{name}'",
                advice=f"it has: {', '.join(result) or 'none'}",
            )
        if missing:
            raise TypeInferenceError(f"accel.{self.name} needs the attribute '{missing}'")
        return result

    def check_attributes(self, given: Mapping[str, Attribute]) -> dict[str, Any]:
        """`complete_attributes`, and every value fits its annotation. TypeInferenceError if not."""
        result = self.complete_attributes(given)
        for spec in self.attributes:
            if not spec.accepts(result[spec.name]):
                raise TypeInferenceError(
                    f"accel.{self.name}: {spec.name} = {result[spec.name]!r} is not "
                    f"{spec.annotation}"
                )
        return result

    def infer_types(
        self,
        types: Sequence[TensorType],
        attributes: Mapping[str, Attribute],
        segments: tuple[int, ...] | None = None,
    ) -> tuple[TensorType, ...]:
        """Result types. Raises TypeInferenceError for operands or attributes that do not fit.

        Results are remembered: `infer` is a function of these arguments alone, and models repeat
        their layers.
        """
        try:
            key = (tuple(types), segments, attributes_key(attributes))
            known = self._inferred.get(key)
        except TypeError as error:
            raise TypeInferenceError(
                f"accel.{self.name}: an attribute holds {error}", advice="use tuples"
            ) from error
        if known is None:
            known = self._infer(types, attributes, segments)
            if len(self._inferred) >= _REMEMBERED:
                self._inferred.clear()
            self._inferred[key] = known
        return known

    def _infer(
        self,
        types: Sequence[TensorType],
        attributes: Mapping[str, Attribute],
        segments: tuple[int, ...] | None,
    ) -> tuple[TensorType, ...]:
        if self.infer is None:
            raise TypeInferenceError(f"accel.{self.name} carries its own result types")
        complete = self.check_attributes(attributes)
        args = self.group_operands(types, segments)
        try:
            result = self.infer(*args, **complete)
        except AccelError:
            raise
        except Exception as error:  # operands or attributes of a kind that `infer` did not expect
            raise TypeInferenceError(
                f"accel.{self.name}: operands or attributes do not fit: "
                f"{type(error).__name__}: {error}"
            ) from error
        return (result,) if isinstance(result, TensorType) else tuple(result)


# Inferred types that each definition remembers.
_REMEMBERED = 20000

_REGISTRY: dict[str, OpDefinition] = {}


def _signature(function: Callable[..., Any], skip: int = 0) -> tuple[list, list]:
    operands: list[OperandSpec] = []
    attributes: list[AttributeSpec] = []
    for p in list(inspect.signature(function).parameters.values())[skip:]:
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            operands.append(OperandSpec(p.name, variadic=True))
        elif p.kind is inspect.Parameter.KEYWORD_ONLY:
            attributes.append(AttributeSpec(p.name, str(p.annotation), p.default))
        else:
            operands.append(OperandSpec(p.name, optional=p.default is None))
    return operands, attributes


def register(definition: OpDefinition) -> OpDefinition:
    if definition.name in _REGISTRY:
        raise OptionError(f"op '{definition.name}' is defined twice")
    _REGISTRY[definition.name] = definition
    return definition


def define(name: str, traits: Trait = Trait.NONE) -> Callable[[type], OpDefinition]:
    """Class decorator that registers an op definition (see the module docstring).

    `evaluate` may be an `Aten` instead of a function, or a tuple of them of which the first that
    holds is taken; then a runtime can call it by name. Where `evaluate` is a function, such forms
    may stand in `call`: they must compute the same.
    """

    def wrap(cls: type) -> OpDefinition:
        infer = getattr(cls, "infer", None)
        evaluate = getattr(cls, "evaluate", None)
        decompose = getattr(cls, "decompose", None)
        source = infer or evaluate
        if source is None:
            raise OptionError(f"op '{name}' has neither infer nor evaluate")
        operands, attributes = _signature(source)
        for spec in attributes:
            attribute_check(spec.annotation)  # an unknown annotation is an error here
        calls = evaluate if isinstance(evaluate, (Aten, tuple)) else getattr(cls, "call", ())
        full = traits | (Trait.COMPOSITE if decompose is not None else Trait.NONE)
        made = OpDefinition(
            name,
            full,
            tuple(operands),
            tuple(attributes),
            infer,
            evaluate,
            decompose,
            (calls,) if isinstance(calls, Aten) else tuple(calls),
            inspect.cleandoc(cls.__doc__ or ""),
            cls.__module__.rsplit(".", 1)[-1],
        )
        if isinstance(evaluate, (Aten, tuple)):
            made.evaluate = _evaluate_aten(made)
        return register(made)

    return wrap


def _evaluate_aten(definition: OpDefinition) -> Callable[..., Any]:
    def evaluate(*args: Any, **attributes: Any) -> Any:
        call = definition.aten_call(args, attributes)
        if call is None:
            raise ValueError("no ATen overload computes this op for these operands and attributes")
        made = _resolved(call.overload)(*call.args, **call.kwargs)
        return made if isinstance(made, torch.Tensor) else [r for r in made if r is not None]

    return evaluate


_resolved = functools.cache(resolve_overload)


def definition(name: str) -> OpDefinition:
    """The definition of `accel.<name>`; KeyError if there is none."""
    return _REGISTRY[name]


def has_definition(name: str) -> bool:
    return name in _REGISTRY


def definitions() -> Iterator[OpDefinition]:
    """All definitions, by name."""
    return iter(sorted(_REGISTRY.values(), key=lambda d: d.name))
