"""Views and in-place writes as pure values.

Every fake tensor met while importing has a `Handle`: which storage it lives in and, if it is a
view, of which tensor and through which call. A write replaces the handle's value and, through the
inverse of each view, the values of the tensors it is a view of. Other views of that storage are
read again (their call is lowered once more over the new value) the next time somebody asks for
them. So the program holds no writes, and a view that nobody writes through costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy
import torch
from torch import Tensor

from accel.errors import CaptureError
from accel.frontends.calls import Call, storage_key
from accel.ir.module import Value
from accel.ir.types import same_dim, same_shape

if TYPE_CHECKING:
    from accel.frontends.importer import Importer


@dataclass(eq=False, slots=True)
class Storage:
    """What a set of aliases shares; `version` counts writes."""

    version: int = 0


@dataclass(eq=False, slots=True)
class Handle:
    """One tensor: its current value, and where it came from if it is a view.

    `make` gives the first value when somebody asks: weights that are never read make no op.
    """

    storage: Storage
    value: Value | None
    version: int = 0
    parent: Handle | None = None
    call: Call | None = None
    tensor: Tensor | None = None  # the view's own fake tensor
    source: Tensor | None = None  # the parent's fake tensor
    make: Callable[[], Value] | None = None


class Aliases:
    """Handles of all tensors of one import, by identity of the fake tensor."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer
        self._handles: dict[int, Handle] = {}
        self._keep: list[Tensor] = []  # ids stay unique as long as the tensors live

    def close(self) -> None:
        """Forgets all, at the end of an import: handles and importer refer to each other."""
        self._handles.clear()
        self._keep.clear()
        del self._importer

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._handles

    def add_root(
        self, tensor: Tensor, value: Value | None, make: Callable[[], Value] | None = None
    ) -> None:
        """A tensor that owns its storage."""
        self._add(tensor, Handle(Storage(), value, make=make))

    def add_result(self, tensor: Tensor, value: Value, call: Call, sources: list[Tensor]) -> None:
        """A result of `call`: a view if it shares the storage of one of `sources`."""
        key = storage_key(tensor)
        for source in sources:
            if key and storage_key(source) == key and id(source) in self._handles:
                parent = self._handles[id(source)]
                self._add(
                    tensor,
                    Handle(parent.storage, value, parent.storage.version, parent, call, tensor,
                           source),
                )  # fmt: skip
                return
        self.add_root(tensor, value)

    def same(self, tensor: Tensor, other: Tensor) -> None:
        """`tensor` is another Python object for `other`."""
        self._handles[id(tensor)] = self._handles[id(other)]
        self._keep.append(tensor)

    def written(self, tensor: Tensor) -> bool:
        """Whether anything wrote to the tensor's storage."""
        return self._handles[id(tensor)].storage.version > 0

    def read(self, tensor: Tensor) -> Value:
        """The tensor's current value."""
        handle = self._handles.get(id(tensor))
        if handle is None:
            handle = self._find_twin(tensor)
        if handle.version != handle.storage.version or handle.value is None:
            self._refresh(handle)
        assert handle.value is not None
        return handle.value

    def write(self, tensor: Tensor, value: Value) -> None:
        """The tensor's elements become `value` (of its shape and dtype)."""
        handle = self._handles[id(tensor)]
        # All parents must be current before they are changed.
        chain = [handle]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        for h in reversed(chain):
            if h.version != h.storage.version or h.value is None:
                self._refresh(h)
        handle.storage.version += 1
        for h in chain:
            h.value, h.version = value, handle.storage.version
            if h.parent is not None:
                assert h.parent.value is not None
                value = unview(self._importer, h, h.parent.value, value)

    def _refresh(self, handle: Handle) -> None:
        if handle.value is None and handle.make is not None:
            handle.value = handle.make()
            return
        if handle.parent is None or handle.call is None or handle.tensor is None:
            raise CaptureError("a tensor is read whose value is not known")
        if handle.parent.version != handle.storage.version:
            self._refresh(handle.parent)
        handle.value = self._importer.replay(handle.call, handle.tensor)
        handle.version = handle.storage.version

    def _find_twin(self, tensor: Tensor) -> Handle:
        """`tensor.data` and the like make new Python objects without a call."""
        key = storage_key(tensor)
        for known in reversed(self._keep):
            if (
                key
                and storage_key(known) == key
                and known.shape == tensor.shape
                and known.stride() == tensor.stride()
                and known.storage_offset() == tensor.storage_offset()
            ):
                self.same(tensor, known)
                return self._handles[id(tensor)]
        raise CaptureError(
            f"a tensor of shape {tuple(tensor.shape)} appears that is neither an input, a weight, "
            "nor the result of a recorded operation",
            where=str(self._importer.location or ""),
        )

    def _add(self, tensor: Tensor, handle: Handle) -> None:
        self._handles[id(tensor)] = handle
        self._keep.append(tensor)


Inverse = Callable[["Importer", Handle, Value, Value], Value]
_INVERSES: dict[str, Inverse] = {}


def inverse(*names: str) -> Callable[[Inverse], Inverse]:
    """Registers how a write through a view changes the viewed tensor, by op name."""

    def wrap(function: Inverse) -> Inverse:
        for name in names:
            _INVERSES[f"aten::{name}"] = function
        return function

    return wrap


def unview(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    """`base` with the elements that the view shows replaced by `new`."""
    assert handle.call is not None
    name = handle.call.target._schema.name
    return _INVERSES.get(name, _by_positions)(importer, handle, base, new)


@inverse(
    "view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "unsqueeze",
    "squeeze", "alias", "detach", "contiguous", "to", "view_as", "ravel", "lift_fresh",
    "type_as", "data",
)  # fmt: skip
def _reshaped(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    return importer.b.reshape_to(new, base.shape)


@inverse("t", "transpose", "swapaxes", "swapdims", "numpy_T", "matrix_H", "mT")
def _transposed(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    assert handle.call is not None
    rank = len(base.shape)
    a, b = handle.call.args[1:3] if len(handle.call.args) > 2 else (rank - 2, rank - 1)
    axes = list(range(rank))
    if rank > 1:
        axes[a], axes[b] = axes[b], axes[a]
    result: Value = importer.b.permute(new, axes=tuple(axes))
    return result


@inverse("permute")
def _permuted(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    assert handle.call is not None
    axes = [a % len(base.shape) for a in handle.call.args[1]]
    back = tuple(axes.index(i) for i in range(len(axes)))
    result: Value = importer.b.permute(new, axes=back)
    return result


@inverse(
    "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
)  # fmt: skip
def _sliced(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    """One axis differs: position and step along it follow from offsets and strides."""
    assert handle.tensor is not None and handle.source is not None and handle.call is not None
    view, source = handle.tensor, handle.source
    name = handle.call.target._schema.name.removeprefix("aten::")
    if name == "expand":
        if same_shape(new.shape, base.shape) or view.numel() == source.numel():
            return importer.b.reshape_to(new, base.shape)
        raise CaptureError(
            "a write through an expanded tensor, where several elements share memory",
            where=str(importer.location or ""),
        )
    axis = _axis_argument(handle.call, name) % source.dim()
    if any(same_dim(d, 0) for d in new.shape):
        return base  # nothing is written
    stride = source.stride(axis)
    start = _ratio(importer, view.storage_offset() - source.storage_offset(), stride)
    if name in ("select", "unbind"):
        shape = (*base.shape[:axis], 1, *base.shape[axis + 1 :])
        new = importer.b.reshape(new, shape=shape)
        step = 1
    else:
        step = _ratio(importer, view.stride(axis), stride) if view.size(axis) != 1 else 1
    count = new.shape[axis]
    stop = start + (count - 1) * step + 1
    if start == 0 and step == 1 and same_shape(new.shape, base.shape):
        return new
    result: Value = importer.b.slice_update(base, new, axis=axis, start=start, stop=stop, step=step)
    return result


def _ratio(importer: Importer, distance: int | torch.SymInt, stride: int | torch.SymInt) -> int:
    """How many strides a distance is. Raises CaptureError where that is no number."""
    if isinstance(distance, int) and isinstance(stride, int):
        return distance // stride if stride else 0
    found = sympy.cancel(importer.dim(distance) / sympy.sympify(importer.dim(stride)))
    if not found.is_Integer:
        raise CaptureError(
            "a write through a slice at a symbolic position", where=str(importer.location or "")
        )
    return int(found)


def _axis_argument(call: Call, name: str) -> int:
    position = 1 if name in ("select", "slice", "narrow", "unbind") else 2
    if "dim" in call.kwargs:
        return int(call.kwargs["dim"])
    return int(call.args[position]) if len(call.args) > position else 0


def _by_positions(importer: Importer, handle: Handle, base: Value, new: Value) -> Value:
    """Any other view of a dense tensor: the positions it shows, found by running it on numbers."""
    assert handle.call is not None
    if not base.type.is_static or handle.call.target._schema.name == "aten::view_as_real":
        raise CaptureError(
            f"a write through a view made by {handle.call.target}",
            where=str(importer.location or ""),
            advice="clone the view before writing to it",
        )
    shape = tuple(int(d) for d in base.shape)
    count = int(base.type.numel())
    positions = importer.positions(handle.call, shape)
    if isinstance(positions, (list, tuple)):
        results = list(handle.call.result)
        positions = positions[[r is handle.tensor for r in results].index(True)]
    index = importer.tensor_constant(positions.reshape(-1).to(torch.int64), "positions")
    flat = importer.b.reshape(base, shape=(count,))
    values = importer.b.reshape(new, shape=(positions.numel(),))
    put = importer.b.index_put(flat, values, index, axes=(0,))
    return importer.b.reshape_to(put, base.shape)
