"""Runs sources in Gluon on the CPU: partitions as threads, barriers and copies as they mean.

Triton interprets Triton, not Gluon. What generated sources use of Gluon beyond Triton is here, on
top of that interpreter: shared memory, mbarriers with their phases and counted bytes, copies of
tiles of a matrix (zeros outside of it), and products that read their operands only when they are
waited for, so that a slot which is freed too early gives a wrong result, and a barrier that nobody
completes an error. Layouts mean nothing.

Programs run one after another, but those of a pair at the same time (`accel.backends.cubin.pairs`):
the first one waits for the second one to be launched. What is marked for both reaches both, which
is an error if the other one has ended.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as triton_language
from torch import Tensor

from accel.backends.cubin.pairs import BOTH, EVERYONE, MEET

SECONDS = 20.0  # a wait that takes longer is a deadlock
HEAD_START = "from triton.experimental import gluon\n"
HEAD = """\
import triton
import triton.language as triton_language
from triton.language.extra.cuda import libdevice
from tests.backends.gluon_interpreter import *

"""
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def is_gluon(source: str) -> bool:
    return HEAD_START in source


def interpreted(source: str, name: str) -> str:
    """The source with this module in Gluon's place, and `name`_entry, which Triton launches."""
    start = source.index(HEAD_START)
    end = source.index("\n\n", source.index("\nstore_tile", start))
    source = source[:start] + HEAD + source[end:]
    if MEET in source:
        source = source.replace("tl.warp_specialize(", "tl.warp_specialize_pair(")
    found = re.search(rf"def {name}\((.*?)\):", source)
    assert found is not None
    entry = f"@triton.jit\ndef {name}_entry({found[1]}):\n    {name}({found[1]})\n"
    return f"{source}\n\n{entry}"


@dataclass(frozen=True)
class MapOf:
    """A matrix in the tensor that is another argument."""

    argument: int
    rows: int
    columns: int
    stride: int
    box: tuple[int, int]

    def of(self, args: Sequence[Any]) -> MapArgument:
        tensor = args[self.argument]
        return MapArgument(tensor, self.rows, self.columns, self.stride, self.box)


class MapArgument:
    """A matrix as a kernel's argument: tiles of `box` from a tensor's memory."""

    def __init__(self, tensor: Tensor, rows: int, columns: int, stride: int, box: Sequence[int]):
        self.view = tensor.as_strided((rows, columns), (stride, 1))
        self.box = tuple(box)
        self.dtype, self.layout = tensor.dtype, None

    def tile(self, place: Sequence[Any]) -> tuple[slice, slice]:
        row, column = (int(p) for p in place)
        assert row >= 0 and column >= 0
        return slice(row, row + self.box[0]), slice(column, column + self.box[1])


@dataclass
class RunningProgram:
    """A program's number, what it has in shared memory, and the other one of its pair."""

    number: int
    buffers: list[Any] = field(default_factory=list)
    other: RunningProgram | None = None
    parts: int = 0  # still running
    started: bool = False

    def twin(self, place: int) -> Any:
        """What the other program has there."""
        assert self.other is not None, "a program without a pair"
        assert self.other.parts, "the other program of the pair has ended"
        return self.other.buffers[place]


_THREAD = threading.local()  # of a partition: its program, products in the order of their issue


def _program() -> RunningProgram:
    """The program that this thread runs; a new one if the interpreter has gone on to the next."""
    found: RunningProgram | None = getattr(_THREAD, "program", None)
    number = _tl_number()
    if found is None or (
        getattr(_THREAD, "top", True) and (found.started or found.number != number)
    ):
        found = _THREAD.program = RunningProgram(number)
    return found


def _tl_number() -> int:
    return int(triton_language.program_id(0).handle.data.item())


def _marked(mark: str) -> bool:
    """Whether this thread said so just now."""
    found = getattr(_THREAD, "mark", "") == mark
    if found:
        _THREAD.mark = ""
    return found


class Shared:
    """Buffers in shared memory; rubbish at first. `place` is among those of its program."""

    def __init__(self, data: Tensor, place: int) -> None:
        self.data, self.place = data, place

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)], self.place)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), int(length)), self.place)

    def permute(self, axes: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*axes), self.place)

    def twin(self) -> Shared:
        """The same part of the other program's buffer."""
        whole, own = _program().twin(self.place), self.data
        part = whole.as_strided(own.shape, own.stride(), own.storage_offset())
        return Shared(part, self.place)

    def load(self, layout: object) -> Any:
        return _tensor(self.data)

    def store(self, value: Any) -> None:
        self.data.copy_(_values(value, self.data.dtype))


def _tensor(data: Tensor) -> Any:
    """A value of Triton's interpreter."""
    from triton.runtime.interpreter import TensorHandle

    kind = getattr(triton_language, _NAMES[data.dtype])
    stored = data.view(torch.uint16) if data.dtype == torch.bfloat16 else data
    handle = TensorHandle(stored.clone().numpy(), kind)
    return triton_language.tensor(handle, triton_language.block_type(kind, list(data.shape)))


def _values(value: Any, dtype: torch.dtype) -> Tensor:
    data = torch.from_numpy(value.handle.data.copy())
    return data.view(torch.bfloat16) if dtype == torch.bfloat16 else data


class Barrier:
    """An mbarrier: a phase ends when all arrivals, and all bytes that were announced, are in."""

    def __init__(self, place: int, number: int) -> None:
        self.changed = threading.Condition()
        self.place, self.number = place, number
        self.count = self.missing = self.bytes = self.phase = 0

    def twin(self) -> Barrier:
        made: Barrier = _program().twin(self.place)[self.number]
        return made

    def _end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            self.changed.notify_all()


class _Barriers:
    """`mbarrier` of Gluon."""

    @staticmethod
    def MBarrierLayout() -> str:
        return "barriers"

    @staticmethod
    def init(one: Barrier, count: int) -> None:
        one.count = one.missing = count

    @staticmethod
    def expect(one: Barrier, amount: int) -> None:
        with one.changed:
            one.bytes += amount
            one.missing -= 1
            one._end_phase()

    @staticmethod
    def arrive(one: Barrier, count: int = 1) -> None:
        for each in [one, one.twin()] if _marked(EVERYONE) else [one]:
            with each.changed:
                assert each.missing >= count, "more arrivals than a barrier expects"
                each.missing -= count
                each._end_phase()

    @staticmethod
    def wait(one: Barrier, parity: Any) -> None:
        wanted = int(parity)
        with one.changed:
            if not one.changed.wait_for(lambda: (one.phase & 1) != wanted, SECONDS):
                raise TimeoutError("a barrier that nobody completes")


class _BarrierArray(list[Barrier]):
    def index(self, place: Any) -> Barrier:  # type: ignore[override]
        return self[int(place)]


def bring_tile(one: MapArgument, place: Sequence[Any], barrier: Barrier, target: Shared) -> None:
    """A tile of a matrix to shared memory; zeros outside of the matrix."""
    rows, columns = one.tile(place)
    part = one.view[rows, columns]
    assert tuple(target.data.shape) == one.box
    places = [(target, barrier)]
    if _marked(BOTH):
        places.append((target.twin(), barrier.twin()))
    for there, arrival in places:
        there.data.zero_()
        there.data[: part.shape[0], : part.shape[1]] = part
        with arrival.changed:
            arrival.bytes -= there.data.numel() * there.data.element_size()
            arrival._end_phase()


def store_tile(one: MapArgument, place: Sequence[Any], source: Shared) -> None:
    rows, columns = one.tile(place)
    part = one.view[rows, columns]
    part.copy_(source.data[: part.shape[0], : part.shape[1]])


class Product:
    """One product that is under way: operands in shared memory are read when it is waited for."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.result: Tensor | None = None

    def finish(self) -> None:
        self.result = self.left.float() @ self.right.float()


class Total:
    """A sum of products, some of which may still be under way."""

    def __init__(self, data: Tensor, products: list[Product]) -> None:
        self.data, self.products = data, products


def _issued() -> list[Product]:
    if not hasattr(_THREAD, "issued"):
        _THREAD.issued = []
    issued: list[Product] = _THREAD.issued
    return issued


def warpgroup_mma_init(value: Any) -> Total:
    return value if isinstance(value, Total) else Total(_values(value, torch.float32), [])


def warpgroup_mma(
    left: Any, right: Shared, total: Any, *, use_acc: bool = True, is_async: bool
) -> Total:
    assert is_async
    held = left.data if isinstance(left, Shared) else _values(left, right.data.dtype)
    product = Product(held, right.data)
    _issued().append(product)
    before = warpgroup_mma_init(total)
    if not use_acc:
        return Total(torch.zeros_like(before.data), [product])
    return Total(before.data, [*before.products, product])


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Total]) -> Any:
    """Finishes this partition's products, the first ones first, up to so many."""
    (total,) = deps
    issued = _issued()
    while len(issued) > num_outstanding:
        issued.pop(0).finish()
    data, pending = total.data, []
    for product in total.products:
        if product.result is None:
            pending.append(product)
        else:
            data = data + product.result
    return Total(data, pending) if pending else _tensor(data)


def meet() -> None:
    """A partition's threads are one."""


def fence_async_shared() -> None:
    """Nothing is reordered here."""


Part = tuple[Callable[..., None], Sequence[Any]]


class _Language:
    """`gluon.language`: Triton's, with layouts, shared memory and partitions."""

    NVMMADistributedLayout = staticmethod(lambda *args: None)
    NVMMASharedLayout = SimpleNamespace(get_default_for=lambda *args: None)
    SliceLayout = staticmethod(lambda *args: None)
    DotOperandLayout = staticmethod(lambda *args: None)
    BlockedLayout = staticmethod(lambda *args: None)
    constexpr = staticmethod(lambda value: value)
    static_range = range

    def __getattr__(self, name: str) -> Any:
        return getattr(triton_language, name)

    def arange(self, start: int, end: int, layout: object = None) -> Any:
        return triton_language.arange(start, end)

    def zeros(self, shape: Sequence[int], dtype: Any, layout: object = None) -> Any:
        return _tensor(torch.zeros(*shape))

    def full(self, shape: Sequence[int], value: Any, dtype: Any, layout: object = None) -> Any:
        return triton_language.full(shape, value, dtype)

    def inline_asm_elementwise(
        self, code: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        if code.startswith((BOTH, EVERYONE)):
            assert not getattr(_THREAD, "mark", ""), "two marks without an instruction in between"
            _THREAD.mark = BOTH if code.startswith(BOTH) else EVERYONE
            return None
        if code.startswith(MEET):
            return None
        if code.startswith("rcp.approx"):
            return 1.0 / args[0]
        assert code.startswith("cvt.rn.") and pack == 2, "another instruction than a rounding"
        return args[0].to(dtype)

    def program_id(self, axis: int) -> Any:
        if getattr(_THREAD, "top", True):
            return triton_language.program_id(axis)
        return _scalar(_program().number)

    def convert_layout(self, value: Any, layout: object) -> Any:
        return value

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: object) -> Any:
        buffers = _program().buffers
        place = len(buffers)
        if layout == "barriers":
            made = _BarrierArray(Barrier(place, i) for i in range_(shape[0]))
            buffers.append(made)
            return made
        buffers.append(torch.full(tuple(shape), torch.nan, dtype=dtype))
        return Shared(buffers[-1], place)

    def warp_specialize(self, parts: Sequence[Part], *_: object) -> None:
        program = _program()
        program.started = True
        self._run([(program, part) for part in parts])

    def warp_specialize_pair(self, parts: Sequence[Part], *_: object) -> None:
        """The program with an even number waits until the next one is here as well."""
        program = _program()
        program.started = True
        mine = [(program, part) for part in parts]
        if program.number % 2 == 0:
            self._waiting = program, mine
            return
        first, others = self._waiting
        assert first.number + 1 == program.number, "a program whose pair was not launched"
        first.other, program.other = program, first
        self._run([*others, *mine])

    def _run(self, parts: Sequence[tuple[RunningProgram, Part]]) -> None:
        failures: list[BaseException] = []
        lock = threading.Lock()

        def run(program: RunningProgram, part: Part) -> None:
            function, args = part
            _THREAD.program, _THREAD.top = program, False
            try:
                function(*args)
            except BaseException as error:
                failures.append(error)
            with lock:
                program.parts -= 1

        for program, _ in parts:
            program.parts += 1
        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


range_ = range


def _scalar(value: int) -> Any:
    from triton.runtime.interpreter import _implicit_cvt

    return _implicit_cvt(value)


def _scalars(*bounds: Any) -> Iterator[Any]:
    """`range`, whose values are scalars of the interpreter."""
    return (_scalar(i) for i in range_(*(int(b) for b in bounds)))


range = _scalars  # what sources see
tl = _Language()
mbarrier = _Barriers()
tma = SimpleNamespace(store_wait=lambda pending: None)
gluon = SimpleNamespace(jit=lambda function: function)
__all__ = [
    "bring_tile", "fence_async_shared", "gluon", "mbarrier", "meet", "range", "store_tile", "tl",
    "tma",
    "warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait",
]  # fmt: skip
