"""Processes that compile: what they make, what they say of failures, and what happens without."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from accel.backends.cubin import pool
from accel.backends.cubin.compile import Unit, compile_unit
from accel.backends.cubin.pool import Pool
from accel.backends.triton import TritonBackend
from accel.backends.triton.backend import unit_of
from accel.errors import BackendError
from accel.ir import TensorType
from tests.backends.kernels import function_of, kernel_of

ROWS = function_of([TensorType((48, 96), torch.float32)], lambda b, x: b.softmax(x, axis=-1))


@pytest.fixture(scope="module")
def unit() -> Unit:
    (code,) = TritonBackend().generate([kernel_of(ROWS, "rowwise")])[1].values()
    (launch,) = code.launches
    return unit_of(launch, "sm_90")


def test_processes_make_what_this_one_makes(unit: Unit) -> None:
    with Pool(2) as processes:
        made = [processes.submit(unit) for _ in range(3)]
        assert [one.result() for one in made] == [compile_unit(unit)] * 3


def test_a_failure_says_what_triton_says(unit: Unit) -> None:
    wrong = replace(unit, source=unit.source.replace("tl.load(", "tl.lead("))
    with pytest.raises(BackendError) as here:
        compile_unit(wrong)
    with Pool(2) as processes, pytest.raises(BackendError) as there:
        processes.submit(wrong).result()
    assert str(there.value) == str(here.value) and "lead" in str(there.value.__cause__)


def test_what_a_process_dies_of_costs_that_alone(unit: Unit) -> None:
    deadly = replace(unit, source=f"import os\nos._exit(3)\n{unit.source}")
    with Pool(2) as processes:
        made = [processes.submit(one) for one in (deadly, unit, unit)]
        with pytest.raises(BackendError, match="the process that compiled it ended"):
            made[0].result()
        assert made[1].result() == made[2].result() == compile_unit(unit)


def test_without_processes_this_one_compiles(
    unit: Unit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "_START", "raise SystemExit(3)")
    monkeypatch.setattr(logging.getLogger("accel"), "propagate", True)
    with caplog.at_level("WARNING"), Pool(2) as none:
        assert none.submit(unit).result() == compile_unit(unit)
    assert "this one goes on by itself" in caplog.text


def test_a_pool_is_closed_at_once() -> None:
    processes = Pool(2)
    server = processes._server
    processes.close()
    assert server is not None and server.returncode is not None


def test_processes_import_no_torch() -> None:
    code = (
        "import sys, accel.backends.cubin.server as s; s.prepare(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
