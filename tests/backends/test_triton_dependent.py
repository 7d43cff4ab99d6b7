"""Dependent launches: what stands before the wait, in every source that the generator makes."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
import torch

from accel.backends.triton import TritonBackend, kernel_fingerprint
from accel.backends.triton.dependent import LAUNCH, WAIT, overlapped
from tests.backends.kernels import f32, function_of, kernel_of
from tests.backends.test_triton_gemv import CASES
from tests.backends.test_tvm_kernels import INDEX_CASES, REDUCTION_CASES
from tests.backends.triton_worker import Job, Worker

SOURCE = """
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.jit
def one(x0, x1, n, y0, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ok = col < n
    a = tl.load(x0 + col, mask=ok)
    col = col + 0
    b = tl.load(x1 + col, mask=ok).to(tl.float32) * 2.0
    c = a + b
    tl.store(y0 + col, c, mask=ok)
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def body(source: str) -> list[str]:
    return [line.strip() for line in source.split("def one")[1].splitlines()[1:] if line.strip()]


def test_constants_are_loaded_before_the_wait_and_used_behind_it() -> None:
    made = body(overlapped(SOURCE, "one", {"x1", "n"}))
    assert made == [
        "gdc_launch_dependents()",
        "col = tl.program_id(0) * COLS + tl.arange(0, COLS)",
        "ok = col < n",
        "gdc_wait()",
        "a = tl.load(x0 + col, mask=ok)",
        "col = col + 0",
        "b = tl.load(x1 + col, mask=ok).to(tl.float32) * 2.0",
        "c = a + b",
        "tl.store(y0 + col, c, mask=ok)",
    ]  # a second value of `col` stays behind the load that reads the first
    plain = SOURCE.replace("    col = col + 0\n", "")
    made = body(overlapped(plain, "one", {"x1", "n"}))
    assert made[3:6] == ["ahead_1 = tl.load(x1 + col, mask=ok)", "gdc_wait()", made[5]]
    assert "b = ahead_1.to(tl.float32) * 2.0" in made


def test_nothing_is_known_to_be_constant_by_itself() -> None:
    made = body(overlapped(SOURCE, "one", set()))
    assert made[:3] == [
        "gdc_launch_dependents()",
        "col = tl.program_id(0) * COLS + tl.arange(0, COLS)",
        "gdc_wait()",
    ]


def test_a_wait_of_its_own_stays_where_it_is() -> None:
    own = SOURCE.replace("    b = ", "    gdc_wait()\n    b = ")
    made = body(overlapped(own, "one", {"x0", "x1", "n"}))
    assert made[0] == "gdc_launch_dependents()" and made.count("gdc_wait()") == 1
    assert made[5] == "gdc_wait()"


def test_the_interpreter_notices_a_read_before_the_wait(worker: Worker) -> None:
    args = [torch.ones(8), torch.ones(8), 8, torch.zeros(8)]

    def run(source: str) -> torch.Tensor:
        made = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        return worker.run(Job(source, "one", made, {"COLS": 8}, 1, [3], [0]))[0]

    assert torch.equal(run(overlapped(SOURCE, "one", {"x1", "n"})), torch.full((8,), 3.0))
    wrong = overlapped(SOURCE.replace("    col = col + 0\n", ""), "one", {"x0", "x1", "n"})
    assert bool(run(wrong).isnan().all())


def _sources() -> Iterator[tuple[str, str, set[str]]]:
    kernels = [kernel_of(function_of(t, b), "gemv", 1) for t, b in CASES.values()]
    for case in (*INDEX_CASES.values(), *REDUCTION_CASES.values()):
        kernels.append(kernel_of(function_of(case.types, case.build), "pointwise", 1))
    for kernel in kernels:
        _, made = TritonBackend().generate([kernel])
        for code in made.values():
            for launch in code.launches:
                assert launch.dependent
                constants = {f"x{s.number}" for s in launch.reads if s.kind == "input"} - {"x0"}
                yield launch.source, launch.name, constants


def test_every_source_waits_once_before_it_touches_what_others_write() -> None:
    count = 0
    for source, name, constants in _sources():
        function = next(
            n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name
        )
        calls = [ast.unparse(s) for s in function.body]
        assert calls[0] == f"{LAUNCH}()" and source.count(f"{WAIT}()") == 1
        place = calls.index(f"{WAIT}()")
        for statement in function.body[1:place]:
            assert isinstance(statement, ast.Assign), source
            names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
            pointers = {n for n in names if n[0] in "xyts" and n[1:].isdigit()}
            assert pointers <= constants and "status" not in names, source
        count += 1
    assert count > 50


def test_older_gpus_have_no_such_instructions() -> None:
    kernel = kernel_of(function_of([f32(4)], lambda b, x: b.exp(x)))
    _, made = TritonBackend("sm_80").generate([kernel])
    (code,) = made.values()
    assert not code.launches[0].dependent and WAIT not in code.launches[0].source


def test_kernels_with_other_constants_are_other_kernels() -> None:
    function = function_of([f32(1, 64), f32(8, 64)], lambda b, x, w: b.linear(x, w))
    one, other = kernel_of(function, "gemv"), kernel_of(function, "gemv", 1)
    assert kernel_fingerprint(one) != kernel_fingerprint(other)
    assert kernel_fingerprint(one) == kernel_fingerprint(kernel_of(function, "gemv"))
