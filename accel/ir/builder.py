"""Builds ops: `b.add(x, y)`, `b.softmax(x, axis=-1)`: any definition's name is a method.

The result is a Value for one result, a tuple for several. Ops go where the builder points: the end
of a region, or before an op. Location and pass name are stamped on everything it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from accel.errors import TypeInferenceError
from accel.ir.module import Location, Op, Region, Value
from accel.ir.op import Attribute, definition, has_definition
from accel.ir.types import Dim, Shape, TensorType, same_shape


class Builder:
    """Inserts new ops at the end of `region`, or before the op `before`."""

    def __init__(
        self,
        region: Region | None = None,
        *,
        before: Op | None = None,
        location: Location | None = None,
        made_by: str = "",
    ) -> None:
        target = before.parent if before is not None else region
        if target is None:
            raise ValueError("a Builder needs a region, or an op that is in one")
        self.region = target
        self.before = before
        self.location = location or (before.location if before is not None else None)
        self.made_by = made_by

    def op(
        self,
        name: str,
        operands: Sequence[Value | None] = (),
        attributes: Mapping[str, Attribute] | None = None,
        *,
        types: Sequence[TensorType] | None = None,
        regions: Sequence[Region] = (),
    ) -> Op:
        """Inserts `accel.<name>`. `operands` may hold None for absent optional ones.

        Result types are inferred; only ops that carry their own (constant, kernel, call, aten)
        take `types`. Raises TypeInferenceError with the op's location.
        """
        d = definition(name)
        segments: tuple[int, ...] | None = None
        given = [v for v in operands if v is not None]
        if d.needs_segments:
            sizes = []
            for i, spec in enumerate(d.operands):
                if spec.variadic:
                    sizes.append(max(len(operands) - i, 0))
                else:
                    sizes.append(int(i < len(operands) and operands[i] is not None))
            segments = tuple(sizes)
        attributes = {k: _plain(v) for k, v in attributes.items()} if attributes else {}
        if d.infer is not None:
            try:
                types = d.infer_types([v.type for v in given], attributes, segments)
            except TypeInferenceError as error:
                if not error.where and self.location is not None:
                    error.where = str(self.location)
                raise
        elif types is None:
            raise TypeInferenceError(f"accel.{name} needs explicit result types")
        new = Op(
            d,
            given,
            attributes,
            types,
            regions=regions,
            segments=segments,
            location=self.location,
            made_by=self.made_by,
        )
        if self.before is not None:
            self.region.insert_before(new, self.before)
        else:
            self.region.append(new)
        return new

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not has_definition(name):
            raise AttributeError(f"there is no op accel.{name}")

        def make(*operands: Value | None, **attributes: Attribute) -> Any:
            op = self.op(name, operands, attributes)
            return op.results[0] if len(op.results) == 1 else tuple(op.results)

        return make

    def constant(self, name: str, type: TensorType) -> Value:
        """The weight `name` of the module's store."""
        value = self.op("constant", (), {"name": name}, types=(type,)).result
        value.name = name.rsplit(".", 1)[-1] if not value.name else value.name
        return value

    def scalar(self, value: bool | int | float | complex, dtype: torch.dtype) -> Value:
        """A 0-d constant, with `value` converted to what the dtype holds."""
        if dtype == torch.bool:
            value = bool(value)
        elif dtype.is_floating_point and not isinstance(value, complex):
            value = float(value)
        elif not dtype.is_complex and not isinstance(value, complex):
            value = int(value)
        result: Value = self.full(value=value, dtype=dtype)
        return result

    def full_of(self, shape: Shape, value: bool | int | float, dtype: torch.dtype) -> Value:
        result: Value = self.full(value=value, dtype=dtype, shape=shape)
        return result

    def size_like(self, dim: Dim, dtype: torch.dtype) -> Value:
        """A dimension as a 0-d tensor of `dtype`: a constant when it is known."""
        if isinstance(dim, int):
            return self.scalar(dim, dtype)
        return self.cast_to(self.size(value=dim), dtype)

    def cast_to(self, x: Value, dtype: torch.dtype) -> Value:
        """x itself if it has the dtype, else a cast."""
        if x.dtype == dtype:
            return x
        result: Value = self.cast(x, dtype=dtype)
        return result

    def widen(self, x: Value) -> Value:
        """float32 for 16-bit and smaller floats, else x: where decompositions compute."""
        if x.dtype.is_floating_point and x.dtype.itemsize < 4:
            return self.cast_to(x, torch.float32)
        return x

    def reshape_to(self, x: Value, shape: Shape) -> Value:
        """x itself if it has the shape, else a reshape."""
        if same_shape(x.shape, shape):
            return x
        result: Value = self.reshape(x, shape=shape)
        return result

    def decompose(self, op: Op) -> list[Value]:
        """Emits the decomposition of a composite op; returns the values of its results."""
        d = op.definition
        if d.decompose is None:
            raise TypeInferenceError(f"accel.{op.name} has no decomposition")
        attributes = d.complete_attributes(op.attributes)
        made = d.decompose(self, *op.arguments(), **attributes)
        return [made] if isinstance(made, Value) else list(made)


def _plain(value: Any) -> Attribute:
    """Lists become tuples, so that attributes compare and hash; sympy integers become ints."""
    if isinstance(value, (list, tuple)):
        return tuple([_plain(v) for v in value])
    if type(value) in (int, str, float, bool):
        return value
    if getattr(value, "is_Integer", False):
        return int(value)
    result: Attribute = value
    return result
