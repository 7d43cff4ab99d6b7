"""Generated kernels under NVIDIA's compute-sanitizer, which finds reads and writes out of bounds.

    python -m tests.gpu.sanitize compile sm_90      # fills the compile cache; needs no GPU
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \\
        python -m tests.gpu.sanitize run

`make sanitize` does both. Each kernel runs alone, and without torch's memory pool each of its
tensors is an allocation of its own, so that the first byte beyond one is found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from accel.backends.triton import TritonBackend
from accel.compiler import gpu
from accel.compiler.cache import CompileCache
from accel.compiler.kernel_jobs import Job, Workers
from accel.compiler.lower import lower_function
from accel.compiler.measure import sample_inputs
from accel.config import cache_dir
from accel.ir import Builder, Function, Module, Op
from accel.ir.cost import typical_sizes
from accel.ir.module import SymbolInfo
from accel.ir.types import SUB_BYTE_BITS, TensorType
from accel.runtime import libraries
from accel.runtime.device import DeviceWeights, load_code
from accel.runtime.executor import CompiledFunction
from accel.runtime.prepare import TensorWeights
from accel.runtime.subbyte import stored_shape
from tests.backends import test_triton_attention as attention
from tests.backends import test_triton_attention_overlapped as turns
from tests.backends import test_triton_cached as cached
from tests.backends import test_triton_depthwise as depthwise
from tests.backends import test_triton_gemv as gemv
from tests.backends import test_triton_matmul as matmul
from tests.backends import test_triton_overlapped as overlapped
from tests.backends import test_triton_skinny as skinny
from tests.backends.kernels import function_of, kernel_of
from tests.backends.test_triton_kernels import LONG
from tests.backends.test_tvm_fuzz import Generator
from tests.backends.test_tvm_kernels import INDEX_CASES, REDUCTION_CASES, SYMBOLIC

FUZZ = 100
INDEX = "sanitize.json"
_PERMITTED = 20  # kernels of the suite may have no code on an older GPU


def suite() -> list[tuple[Function, str]]:
    """Functions and their kinds: those of the tests on the CPU."""
    plain = [function_of(c.types, c.build) for c in (INDEX_CASES | REDUCTION_CASES).values()]
    plain += [function_of(types, build) for types, build, _ in LONG.values()]
    plain += [function_of(types, build) for types, build, _ in SYMBOLIC.values()]
    plain += [Generator(seed).run() for seed in range(FUZZ)]
    made = [(f, "pointwise") for f in plain]
    made += [(function_of(types, build), "gemv") for types, build in gemv.CASES.values()]
    made += [(function_of(types, build), "matmul") for types, build in matmul.CASES.values()]
    made += [(case.function(), "attention") for case in attention.CASES.values()]
    made += [(function_of(t, build), "attention") for t, build, _ in attention.REGIONS.values()]
    made += [(case.function(), "cached_attention") for case in cached.CASES]
    made += [(function_of(t, build), "skinny") for t, build in skinny.CASES.values()]
    made += [(function_of(t, build), "matmul") for t, build in overlapped.CASES.values()]
    made += [(function_of(t, build), "depthwise") for t, build in depthwise.CASES.values()]
    made += [(function_of(t, build), "attention") for t, build, _ in turns.CASES.values()]
    return made


def module_of(function: Function, kind: str) -> Module:
    """A function that calls the kernel; operands of less than a byte an element are weights."""
    module = Module()
    kernel = kernel_of(function, kind)
    main = module.add(Function("main", [a.type for a in function.args if not _packed(a.type)]))
    names = {s.name for a in function.args for d in a.shape if not isinstance(d, int)
             for s in d.free_symbols}  # fmt: skip
    main.symbols = {name: SymbolInfo() for name in sorted(names)}
    b, given = Builder(main.body), iter(main.args)
    for i, arg in enumerate(function.args):
        if _packed(arg.type):
            shape = tuple(int(d) for d in arg.shape)
            value = torch.randint(0, 256, stored_shape(shape, arg.dtype), dtype=torch.uint8)
            name = module.weights.add_lazy(f"w{i}", arg.type, _always(value))
            kernel.set_operand(i, b.constant(name=name, type=arg.type))
        else:
            kernel.set_operand(i, next(given))
    main.body.append(kernel)
    b.op("return", list(kernel.results))
    return module


def _packed(type_: TensorType) -> bool:
    return type_.dtype in SUB_BYTE_BITS


def _always(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def kernel_in(module: Module) -> Op:
    return next(op for op in module.main.ops if op.name == "kernel")


def compile_all(arch: str) -> None:
    """Fills the cache, and leaves the keys of the suite's kernels beside it."""
    backend = TritonBackend(arch)
    modules = [module_of(function, kind) for function, kind in suite()]
    jobs = [Job.of(kernel_in(module), backend) for module in modules]
    with Workers() as workers:
        done = workers.compile(jobs)
    failed = [job.key for job in jobs if done.get(job.key) is not None]
    keys = ["" if job.key in failed else job.key for job in jobs]
    (cache_dir() / INDEX).write_text(json.dumps({"arch": arch, "keys": keys}))
    print(f"{len(keys) - len(failed)} kernels for {arch}, {len(failed)} without code")
    assert len(failed) <= _PERMITTED, [str(e) for e in done.values() if e is not None]


def run_all() -> None:
    """Runs every kernel once, on sizes that no tile divides. Triton is not needed."""
    device = torch.device("cuda", 0)
    index, cache = json.loads((cache_dir() / INDEX).read_text()), CompileCache()
    kernels = launches = 0
    for key, (function, kind) in zip(index["keys"], suite(), strict=True):
        if not key:
            continue
        module, entry = module_of(function, kind), cache.get(key)
        assert entry is not None
        symbols = {kernel_in(module): gpu._symbol(entry.header)}
        plan = lower_function(module.main, module, symbols)
        weights = {name: module.weights.stored(name) for name in module.weights.names()}
        run = CompiledFunction(
            plan,
            DeviceWeights(TensorWeights(weights), device),
            libraries=libraries.get,
            host=load_code(entry.payload, device),
            device=device,
        )
        sizes = {n: 37 if i else 5 for i, n in enumerate(typical_sizes(module.main.symbols))}
        run.step_by_step(sample_inputs(module.main, sizes, device))
        torch.cuda.synchronize()
        kernels += 1
        launches += sum(step.kind == "kernel" for step in plan.steps)
        if kernels % 50 == 0:
            print(f"{kernels} kernels...", flush=True)
    print(f"{kernels} kernels, {launches} launches, for {index['arch']}")


def main() -> None:
    if sys.argv[1:] == ["run"]:
        run_all()
    else:
        compile_all(sys.argv[2] if len(sys.argv) > 2 else "sm_90")


if __name__ == "__main__":
    main()
