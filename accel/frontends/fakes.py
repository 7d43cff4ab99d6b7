"""Fake tensors made fast: what calls return is remembered, and weights get theirs directly.

PyTorch works out the result of a call on fake tensors in Python, 0.1 to 0.5 ms a call, and a deep
model repeats the same few dozen calls. `ResultMemo.call` keeps how results look (shape, strides,
dtype, and whether they share memory with an argument), keyed by all that a result can depend on,
and makes an equal fake tensor in a tenth of the time: equal layers go through shape functions once.
Sizes may be symbols: then the key has their expressions, and what a call told torch about them the
first time (a guard) stays true. Only plain cases are kept: dense tensors on the CPU, and ops that
write nothing. Everything else is asked anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from accel.frontends.calls import storage_key

Key: TypeAlias = tuple[Any, ...]
Size: TypeAlias = int | torch.SymInt

_CPU = torch.device("cpu")
_PLAIN_SELF = "_accel_plain"  # an attribute of fakes that are made here
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout,
          torch.memory_format, type(None))  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Made:
    """How one result looks; `argument` >= 0: the tensor argument whose memory it shares."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: torch.dtype
    offset: Size = 0
    argument: int = -1
    same: bool = False  # the argument itself
    contiguous: bool = False  # known without asking about symbols


@dataclass(frozen=True, slots=True)
class _Entry:
    results: tuple[_Made, ...]
    container: type | None  # of several results


class ResultMemo:
    """Results of calls within one capture."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry | None] = {}  # None: not to be remembered

    def call(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`func(*args, **kwargs)`, or fake tensors that cannot be told from its results."""
        tensors: list[FakeTensor] = []
        key = None if func._schema.is_mutable else _key(func, args, kwargs, tensors)
        if key is None:
            return func(*args, **kwargs)
        if key not in self._entries:
            result = func(*args, **kwargs)
            self._entries[key] = _describe(result, tensors)
            return result
        entry = self._entries[key]
        if entry is None:
            return func(*args, **kwargs)
        made = [_make(m, tensors) for m in entry.results]
        return entry.container(made) if entry.container is not None else made[0]


def _key(
    func: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[FakeTensor],
) -> Key | None:
    """All that the result can depend on; None where that is not plain. Fills `tensors`."""
    parts: list[Any] = [func, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")]
    if not _add(args, parts, tensors):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _add((value,), parts, tensors):
            return None
    return tuple(parts) if tensors else None


def _add(values: Any, parts: list[Any], tensors: list[FakeTensor]) -> bool:
    for value in values:
        kind = type(value)
        parts.append(kind)
        if kind is FakeTensor:
            if not _is_plain_fake(value):
                return False
            # Which arguments are one tensor, or share memory, counts: results go by position.
            twins = tuple(
                (i, t is value) for i, t in enumerate(tensors) if _storage(t) == _storage(value)
            )
            look = _look(value)
            if look is None:
                return False
            parts += (look, value.dtype, twins)
            tensors.append(value)
        elif kind in (tuple, list):
            parts.append(len(value))
            if not _add(value, parts, tensors):
                return False
        elif kind in _PLAIN:
            parts.append(value)
        elif kind is torch.SymInt:
            found = _expressions((value,))
            if found is None:
                return False
            parts.append(found)
        else:
            return False
    return True


def _look(tensor: Tensor) -> tuple[Any, ...] | None:
    """Shape, strides and offset; None if one of them is known only when a program runs."""
    if not tensor._has_symbolic_sizes_strides:
        return tensor.shape, tensor.stride(), tensor.storage_offset()
    return _expressions((*tensor.shape, *tensor.stride(), tensor.storage_offset()))


def _expressions(sizes: Iterable[Size]) -> tuple[Any, ...] | None:
    """Sizes as numbers and expressions; None if one is known only when a program runs."""
    made = []
    for size in sizes:
        if isinstance(size, torch.SymInt):
            if not size.node.has_hint():
                return None
            made.append(size.node.expr)
        else:
            made.append(size)
    return tuple(made)


def _is_plain_fake(tensor: FakeTensor) -> bool:
    """A dense fake tensor on the CPU, of which nothing else is known."""
    return (
        tensor.constant is None
        and tensor.fake_device == _CPU
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _describe(result: Any, tensors: list[FakeTensor]) -> _Entry | None:
    if type(result) in (tuple, list):
        made = [_describe_one(r, tensors) for r in result]
        plain = tuple(m for m in made if m is not None)
        return _Entry(plain, type(result)) if plain and len(plain) == len(made) else None
    one = _describe_one(result, tensors)
    return None if one is None else _Entry((one,), None)


def _describe_one(result: Any, tensors: list[FakeTensor]) -> _Made | None:
    if type(result) is not FakeTensor or not _is_plain_fake(result):
        return None
    shape, stride = tuple(result.shape), tuple(result.stride())
    storage = result.untyped_storage()
    for i, tensor in enumerate(tensors):
        if result is tensor:
            return _Made(shape, stride, result.dtype, 0, i, same=True)
        if _storage(tensor) == storage._cdata:
            if result.dtype != tensor.dtype:
                return None
            return _Made(shape, stride, result.dtype, result.storage_offset(), i)
    if not _fills_storage(result):
        return None  # part of something that is not an argument
    return _Made(shape, stride, result.dtype, contiguous=_is_contiguous(shape, stride))


def _is_contiguous(shape: Sequence[Size], stride: Sequence[Size]) -> bool:
    found = _expressions((*shape, *stride))
    count: Size = 1
    for size, step in zip(reversed(shape), reversed(stride)) if found and 0 not in found else ():
        if not _equal(*(_expressions((step, count)) or (0, 1))):
            return False
        count = count * size
    return bool(found)


def _fills_storage(tensor: Tensor) -> bool:
    found = _expressions((*tensor.shape, *tensor.stride(), tensor.storage_offset()))
    if found is None or found[-1] != 0:
        return False
    shape, stride = found[: tensor.dim()], found[tensor.dim() : -1]
    count = sum((d - 1) * s for d, s in zip(shape, stride)) + 1 if 0 not in shape else 0
    held = _expressions((tensor.untyped_storage().nbytes(),))
    return held is not None and _equal(count * tensor.dtype.itemsize, held[0])


def _equal(one: Any, other: Any) -> bool:
    """Whether numbers or expressions are equal whatever the symbols are."""
    return bool(one == other or sympy.expand(one - other) == 0)


def _make(made: _Made, tensors: list[FakeTensor]) -> Tensor:
    if made.argument < 0:
        return _new(tensors[0].fake_mode, made.shape, made.stride, made.dtype, made.contiguous)
    source = tensors[made.argument]
    if made.same:
        return source
    plain: Tensor | None = getattr(source, _PLAIN_SELF, None)
    with torch._C._DisableTorchDispatch():
        if plain is not None:
            view = plain.as_strided(made.shape, made.stride, made.offset)
        else:
            view = torch.empty(0, dtype=made.dtype, device="meta")
            view.set_(source.untyped_storage(), made.offset, made.shape, made.stride)
        return _fake(source.fake_mode, view)


def _new(
    mode: FakeTensorMode,
    shape: tuple[Size, ...],
    stride: tuple[Size, ...],
    dtype: torch.dtype,
    contiguous: bool = False,
) -> FakeTensor:
    """With memory of its own."""
    with torch._C._DisableTorchDispatch():
        if contiguous:  # PyTorch need not compare products of symbols to find out
            meta = torch.empty(shape, dtype=dtype, device="meta")
        else:
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return _fake(mode, meta)


def _fake(mode: FakeTensorMode, plain: Tensor) -> FakeTensor:
    """A fake of a meta tensor, which remembers it: a view of that costs a tenth of one of memory
    (`set_`) where sizes are symbols."""
    made = FakeTensor(mode, plain, _CPU)
    setattr(made, _PLAIN_SELF, plain)
    return made


def fake_weights(
    mode: FakeTensorMode, weights: Mapping[str, Tensor], *, to_cpu: bool = False
) -> dict[str, Tensor]:
    """A fake for each weight; a tied weight, under several names, is one fake.

    Weights that share memory otherwise, and unusual ones, are left to PyTorch's own conversion.
    With `to_cpu` the fakes are on the CPU wherever the weights are, so that a model on a GPU is
    captured with inputs on the CPU.
    """
    distinct = {id(tensor): tensor for tensor in weights.values()}
    owners = Counter(map(storage_key, distinct.values()))
    made: dict[int, Tensor] = {}
    for key, tensor in distinct.items():
        plain = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
        if owners[storage_key(tensor)] == 1 and _is_plain_weight(plain, to_cpu):
            made[key] = _new(mode, tuple(plain.shape), plain.stride(), plain.dtype)
        else:
            plain = plain.cpu() if to_cpu else plain
            made[key] = mode.from_tensor(plain, static_shapes=True)
    return {name: made[id(tensor)] for name, tensor in weights.items()}


def _is_plain_weight(tensor: Tensor, anywhere: bool) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and (anywhere or tensor.device == _CPU)
        and not tensor.requires_grad
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor.is_conj()
        and not tensor.is_neg()
        and _fills_storage(tensor)
    )
