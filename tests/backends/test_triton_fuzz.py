"""Random regions through Triton's interpreter against the IR's interpreter.

The same generator as for CPU kernels (`test_tvm_fuzz`): random shapes, index maps, elementwise ops
and reductions. A failure prints the seed, the IR and the generated source. `--triton-seeds N` runs
more of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accel.ir import WeightStore, interpret, print_function
from tests.backends.test_tvm_fuzz import Generator, _agree, inputs_for
from tests.backends.triton_kernels import InterpretedKernels
from tests.backends.triton_worker import Worker

_TOGETHER = 20  # regions of one test


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    one = Worker()
    yield one
    one.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = int(metafunc.config.getoption("--triton-seeds"))
    parts = [range(i, min(i + _TOGETHER, count)) for i in range(0, count, _TOGETHER)]
    metafunc.parametrize("seeds", parts, ids=[f"{part[0]} to {part[-1]}" for part in parts])


def test_random_regions(worker: Worker, seeds: range) -> None:
    for seed in seeds:
        function = Generator(seed).run()
        runner = InterpretedKernels([function], worker)
        for size in (1, 7, 33) if seed % 3 == 0 else (1,):
            inputs = inputs_for(function, seed, size)
            got = runner(0, inputs)
            wide = [t.double() if t.dtype.is_floating_point else t for t in inputs]
            wanted = interpret(function, wide, WeightStore(), oracle=True)
            same = interpret(function, inputs, WeightStore())
            half = any(r.dtype == torch.float16 for op in function.ops for r in op.results)
            tolerance = 4e-3 if half else 2e-5
            for g, w, s in zip(got, wanted, same, strict=True):
                assert g.shape == s.shape and g.dtype == s.dtype
                assert _agree(g, w, s, tolerance), (
                    f"seed {seed}, size {size}\n{print_function(function)}\n{runner.source(0)}"
                )
