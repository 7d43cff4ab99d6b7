"""Products in Gluon: through the interpreter with its barriers and copies, compiled for Hopper."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from accel.backends.cubin.pairs import BOTH, EVERYONE, paired
from accel.backends.triton import TritonBackend
from accel.backends.triton.cooperative import CooperativeTile, loaded_ahead
from accel.backends.triton.overlapped import OverlappedTile
from accel.backends.triton.paired import PairedTile
from accel.errors import BackendError
from accel.ir import TensorType
from accel.ir.module import Value
from tests.backends.kernels import function_of, kernel_of, sym
from tests.backends.test_triton_gemv import check, halves, inputs_for, turned
from tests.backends.test_tvm_kernels import randn, typed
from tests.backends.triton_worker import Worker

BF16, FP16 = torch.bfloat16, torch.float16
# Small, but such as compile: a group of warps multiplies 64 rows.
TILES = {
    "turns": OverlappedTile(64, 64, 32, 3),
    "shared": CooperativeTile(128, 128, 32, 3),
    "shared by three": CooperativeTile(192, 64, 32, 3, groups=3),
    "paired": PairedTile(128, 128, 16, 3, 4),
    "paired, by three": PairedTile(192, 64, 32, 3, 4, groups=3),
}
# Few programs, so that each has many tiles.
BACKENDS = {name: TritonBackend("sm_90", sms=2, tile=tile) for name, tile in TILES.items()}
BACKEND = BACKENDS["turns"]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


Case = tuple[list[TensorType], Callable[..., Any]]
CASES: dict[str, Case] = {
    "plain": ([typed(FP16, 64, 64), typed(FP16, 64, 64)], lambda b, x, w: b.linear(x, w)),
    "tails": ([typed(BF16, 150, 72), typed(BF16, 88, 72)], lambda b, x, w: b.linear(x, w)),
    "odd columns": ([typed(FP16, 70, 40), typed(FP16, 33, 40)], lambda b, x, w: b.linear(x, w)),
    "one step": ([typed(FP16, 200, 16), typed(FP16, 64, 16)], lambda b, x, w: b.linear(x, w)),
    "bias, gelu": (
        [typed(FP16, 2, 90, 96), typed(FP16, 72, 96), typed(FP16, 72)],
        lambda b, x, w, c: b.gelu(b.linear(x, w, c)),
    ),
    "bias, residual": (
        [typed(FP16, 2, 90, 96), typed(FP16, 136, 96), typed(FP16, 136), typed(FP16, 2, 90, 136)],
        lambda b, x, w, c, r: b.add(b.linear(x, w, c), r),
    ),
    "two results": (
        [typed(BF16, 200, 64), typed(BF16, 40, 64), typed(BF16, 200, 40)],
        lambda b, x, w, r: (lambda y: [y, b.silu(y)])(b.add(b.linear(x, w), r)),
    ),
    "the larger one": (
        [typed(BF16, 100, 64), typed(BF16, 40, 64), typed(BF16, 100, 40)],
        lambda b, x, w, r: b.maximum(b.linear(x, w), r),
    ),
    "a result of another type": (
        [typed(FP16, 100, 64), typed(FP16, 40, 64)],
        lambda b, x, w: b.cast(b.linear(x, w), dtype=BF16),
    ),
    "gate times up": (
        [typed(BF16, 133, 64), typed(BF16, 176, 64)],
        lambda b, x, w: halves(b, b.linear(x, w)),
    ),
    "rotary halves": (
        [typed(BF16, 2, 90, 64), typed(BF16, 128, 64), typed(BF16, 90, 32), typed(BF16, 90, 32)],
        lambda b, x, w, c, s: turned(b, b.linear(x, w), c, s, 3),
    ),
    "a part of the weight": (
        [typed(BF16, 100, 64), typed(BF16, 144, 64)],
        lambda b, x, w: b.relu(b.linear(x, b.slice(w, axis=0, start=48, stop=112))),
    ),
    "columns of x": (
        [typed(BF16, 100, 192), typed(BF16, 48, 64)],
        lambda b, x, w: b.relu(b.linear(b.slice(x, axis=1, start=64, stop=128), w)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_products(worker: Worker, name: str, tile: str) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    function = function_of(types, build)
    source = check(worker, function, inputs_for(types), "matmul", backend=BACKENDS[tile])
    assert "warp_specialize" in source


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("rows", [1, 65, 500])
def test_symbolic_rows(worker: Worker, rows: int, tile: str) -> None:
    types = [typed(BF16, sym("s"), 32), typed(BF16, 72, 32)]
    function = function_of(types, lambda b, x, w: b.silu(b.linear(x, w)))
    inputs = [randn(rows, 32).bfloat16(), randn(72, 32).bfloat16()]
    check(worker, function, inputs, "matmul", backend=BACKENDS[tile])


@pytest.mark.parametrize("seed", range(30))
def test_no_order_of_barriers_hangs(worker: Worker, seed: int) -> None:
    """Tiles, steps and stages in any proportion; the interpreter's threads meet as they may."""
    chance = random.Random(seed)
    rows, columns = chance.randint(2, 300), 8 * chance.randint(1, 24)
    depth, stages = 8 * chance.randint(1, 20), chance.randint(2, 6)
    span, group = chance.choice((16, 32)), chance.randint(1, 4)
    kinds = list(TILES.values())
    tile = replace(kinds[seed % len(kinds)], depth=span, stages=stages, group=group)
    backend = TritonBackend("sm_90", sms=chance.randint(1, 3), tile=tile)
    types = [typed(BF16, rows, depth), typed(BF16, columns, depth), typed(BF16, rows, columns)]
    residual = chance.random() < 0.5
    function = function_of(
        types if residual else types[:2],
        lambda b, x, w, *r: b.add(b.linear(x, w), r[0]) if r else b.relu(b.linear(x, w)),
    )
    torch.manual_seed(seed)
    check(worker, function, inputs_for(types)[: len(function.args)], "matmul", backend=backend)


@pytest.mark.parametrize("tile", BACKENDS)
@pytest.mark.parametrize("name", ["tails", "bias, residual", "gate times up", "one step"])
def test_a_constant_weight_comes_before_the_wait(worker: Worker, name: str, tile: str) -> None:
    types, build = CASES[name]
    torch.manual_seed(0)
    function = function_of(types, build)
    backend = TritonBackend("sm_90", sms=2, tile=replace(TILES[tile], early=True))
    source = check(worker, function, inputs_for(types), "matmul", 1, backend)
    entry = source[source.index("gdc_launch_dependents()\n") :]
    assert "gdc_wait()" not in entry and source.index("m1, [") < source.index("gdc_wait()\n")


def test_a_second_result_ends_where_its_columns_do(worker: Worker) -> None:
    """The last tile's second piece lies beyond all columns."""
    types = [typed(BF16, 70, 32), typed(BF16, 384, 32)]
    function = function_of(types, lambda b, x, w: (lambda y: [b.relu(y), b.neg(y)])(b.linear(x, w)))
    backend = TritonBackend("sm_90", sms=2, tile=CooperativeTile(128, 256, 32, 3))
    torch.manual_seed(0)
    check(worker, function, inputs_for(types), "matmul", backend=backend)


def test_columns_that_are_no_halves_are_refused() -> None:
    """An element's neighbour at a distance, but not within a group of columns."""
    types = [typed(BF16, 64, 64), typed(BF16, 64, 64)]

    def shifted(b: Any, x: Value, w: Value) -> Value:
        y = b.linear(x, w)
        right = b.slice(y, axis=1, start=16, stop=64)
        left = b.slice(y, axis=1, start=0, stop=48)
        pair = b.cat(right, b.slice(y, axis=1, start=0, stop=16), axis=1)
        other = b.cat(b.slice(y, axis=1, start=48, stop=64), left, axis=1)
        return b.add(y, b.add(pair, other))

    with pytest.raises(BackendError, match="other"):
        BACKEND.generate([kernel_of(function_of(types, shifted), "matmul")])


def test_what_is_no_matrix_is_refused() -> None:
    scattered = [typed(FP16, 5, 4, 8, 16), typed(FP16, 48, 64)]
    function = function_of(
        scattered,
        lambda b, x, w: b.linear(b.reshape(b.permute(x, axes=(0, 2, 1, 3)), shape=(5, 8, 64)), w),
    )
    with pytest.raises(BackendError, match="no matrices"):
        BACKEND.generate([kernel_of(function, "matmul")])
    short = [typed(FP16, 64, 60), typed(FP16, 64, 60)]  # rows of 120 bytes
    function = function_of(short, lambda b, x, w: b.linear(x, w))
    with pytest.raises(BackendError, match="no matrices"):
        BACKEND.generate([kernel_of(function, "matmul")])


WHOLE = [OverlappedTile(), CooperativeTile(), CooperativeTile(192, 128, groups=3),
         PairedTile(), PairedTile(192, 128, groups=3)]  # fmt: skip


@pytest.mark.parametrize("tile", WHOLE)
@pytest.mark.parametrize(
    "name", ["bias, gelu", "bias, residual", "the larger one", "gate times up", "odd columns"]
)
def test_compiles_for_hopper(name: str, tile: OverlappedTile) -> None:
    types, build = CASES[name]
    backend = TritonBackend("sm_90", tile=tile)
    made = backend.compile([kernel_of(function_of(types, build), "matmul")])
    (launch,) = made.launches[made.names[0]]
    assert launch.binary.warps == 4 * (tile.groups + 1)
    marks = sum(launch.binary.ptx.count(mark) for mark in (BOTH, EVERYONE))
    instructions = launch.binary.ptx.count(".multicast::cluster")
    instructions += launch.binary.ptx.count("mapa.shared::cluster")
    assert instructions == marks and (marks > 0) == isinstance(tile, PairedTile)
    assert len(launch.binary.maps) == len(launch.code.maps)
    assert launch.binary.shared <= 227 << 10 and "wgmma" in launch.binary.ptx


COPY = (
    "@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%r1], [%rd1, {%r2, %r3}], [%r4];"
)
ARRIVAL = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"


def test_what_is_not_marked_stays() -> None:
    assert paired(f".reqntid 384\n{COPY}\n{ARRIVAL}\n").count("multicast") == 0
    made = paired(f".reqntid 384\n{COPY}\n{BOTH} // %r9\n{COPY}\n{ARRIVAL}\n")
    assert made.count("multicast") == 1 and "mapa" not in made
    assert made.index("multicast") > made.index(BOTH) and ".reqnctapercluster 2" in made


@pytest.mark.parametrize(
    "ptx",
    [
        f".reqntid 384\n{BOTH} // %r9\n@%p8 bra $L__BB0_1;\n{COPY}\n",
        f".reqntid 384\n{EVERYONE} // %r9\n$L__BB0_1:\n{ARRIVAL}\n",
        f".reqntid 384\n{BOTH} // %r9\n{BOTH} // %r8\n{COPY}\n{COPY}\n",
        f".reqntid 384\n{BOTH} // %r9\n",
        f"{EVERYONE} // %r9\n{ARRIVAL}\n",
    ],
)
def test_a_mark_that_has_lost_its_instruction_is_an_error(ptx: str) -> None:
    with pytest.raises(BackendError):
        paired(ptx)


def test_loads_of_one_row_or_column_come_first() -> None:
    lines = [
        "acc_0 = sums", "row = row0 + 1", "col = col0 + 2", "row_ok = row < 9", "i_1 = col % 4",
        "bias_1 = tl.load(x2 + i_1)", "other_1 = tl.load(x3 + row * 8 + col, mask=row_ok)",
        "scale_1 = tl.load(x4 + row, mask=row_ok)", "sum_1 = acc_0 * scale_1 + bias_1 + other_1",
    ]  # fmt: skip
    ahead, rest = loaded_ahead(lines, ("row", "col"))
    assert ahead == [lines[1], lines[2], lines[3], lines[4], lines[5], lines[7]]
    assert rest == [*lines[:5], lines[6], lines[8]]
    assert loaded_ahead(["acc_0 = sums", "row = row0"], ("row", "col"))[0] == []
