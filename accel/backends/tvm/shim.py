"""The C side of a kernel library: entry points, scratch memory, and sharing rows among threads.

Generated code must not bring a second thread pool: two pools that spin on the same cores cost
milliseconds. So `accel_use_pool` is given the addresses of the OpenMP entry points that torch has
loaded already, and every kernel runs on torch's own threads. Without them kernels run serially.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from accel.backends.tvm.kernel import KernelCode, PhaseCode
from accel.errors import BackendError
from accel.ir.types import Dim, numerator

# Element operations below which a phase is not worth waking another thread for.
_GRAIN = 1 << 15

_PRELUDE = r"""
#include <stdint.h>
#include <stdlib.h>

typedef void (*parallel_t)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*query_t)(void);
static parallel_t parallel;
static query_t thread_number, thread_count;

void accel_use_pool(void *start, void *number, void *count) {
    parallel = (parallel_t)start;
    thread_number = (query_t)number;
    thread_count = (query_t)count;
}

typedef struct frame {
    void (*rows)(struct frame *, int64_t, int64_t);
    const int64_t *words;
    char **scratch;
    int *status;
    int64_t count;
} frame;

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static void share(void *data) {
    frame *f = (frame *)data;
    int64_t n = thread_count(), i = thread_number();
    int64_t begin = f->count * i / n, end = f->count * (i + 1) / n;
    if (f->count > 64 * n) { /* whole cache lines, where rows are single elements */
        begin = begin / 16 * 16;
        if (i + 1 < n) end = end / 16 * 16;
    }
    if (begin < end) f->rows(f, begin, end);
}

static void run(frame *f, int64_t count, int64_t cost, int64_t threads) {
    f->count = count;
    if (parallel && threads > 1 && count > 1 && (double)count * (double)cost > GRAIN)
        parallel(share, f, (unsigned)(threads < count ? threads : count), 0);
    else if (count > 0)
        f->rows(f, 0, count);
}

typedef int32_t (*kernel_t)(const int64_t *, int64_t);

/* Kernels one after the other: pairs of an entry point and its words. -1, or 4 * (number of the
   kernel that failed) + its code. */
int64_t accel_run_sequence(const int64_t *pairs, int64_t count, int64_t threads) {
    for (int64_t i = 0; i < count; i++) {
        int32_t code = ((kernel_t)pairs[2 * i])((const int64_t *)pairs[2 * i + 1], threads);
        if (code) return 4 * i + code;
    }
    return -1;
}
"""


def c_source(kernels: Sequence[KernelCode]) -> str:
    """One C file for a library: `int32_t NAME(const int64_t *words, int64_t threads)` a kernel.

    A kernel returns 0, 1 if an index was out of range, 2 if there was no memory for scratch.
    """
    parts = [_PRELUDE.replace("GRAIN", str(_GRAIN)).strip()]
    parts += [_kernel(k) for k in kernels]
    return "\n\n".join(parts) + "\n"


def _kernel(kernel: KernelCode) -> str:
    lines = [_phase(kernel, p) for p in kernel.phases]
    first = kernel.inputs + kernel.results
    lines.append(f"int32_t {kernel.name}(const int64_t *words, int64_t threads) {{")
    for i, symbol in enumerate(kernel.symbols):
        lines.append(f"    const int64_t {symbol} = words[{first + i}]; (void){symbol};")
    lines.append("    int status = 0;")
    if kernel.scratch:
        lines.append(f"    char *scratch[{len(kernel.scratch)}];")
        sizes = [f"(({_c(size)}) + 63) / 64 * 64" for size in kernel.scratch]
        lines.append(f"    char *memory = aligned_alloc(64, {' + '.join(sizes)} + 64);")
        lines.append("    if (!memory) return 2;")
        for i in range(len(kernel.scratch)):
            offset = " + ".join(["0", *sizes[:i]])
            lines.append(f"    scratch[{i}] = memory + ({offset});")
    pointer = "scratch" if kernel.scratch else "0"
    lines.append(f"    frame f = {{0, words, {pointer}, &status, 0}};")
    for phase in kernel.phases:
        lines.append(f"    f.rows = {phase.name}_rows;")
        lines.append(f"    run(&f, {_c(phase.rows)}, {_c(phase.cost)}, threads);")
    if kernel.scratch:
        lines.append("    free(memory);")
    lines += ["    return status;", "}"]
    return "\n".join(lines)


def _phase(kernel: KernelCode, phase: PhaseCode) -> str:
    pointers = kernel.inputs + kernel.results
    args = [f"(void *)f->words[{i}]" for i in range(pointers)]
    args += [f"f->scratch[{i}]" for i in range(len(kernel.scratch))]
    args += ["f->status"]
    args += [f"f->words[{pointers + i}]" for i in range(len(kernel.symbols))]
    types = ["void *"] * (pointers + len(kernel.scratch)) + ["int *"]
    types += ["int64_t"] * (len(kernel.symbols) + 3)
    return (
        f"void {phase.name}({', '.join(types)});\n"
        f"static void {phase.name}_rows(frame *f, int64_t begin, int64_t end) {{\n"
        f"    {phase.name}({', '.join([*args, '0', 'begin', 'end'])});\n}}"
    )


def _c(dim: Dim) -> str:
    """A size as a C expression."""
    if isinstance(dim, int) or dim.is_Integer:
        return f"INT64_C({int(dim)})"
    if dim.is_Symbol:
        return str(dim.name)
    if dim.is_Add:
        over, under = numerator(dim)
        if under != 1:  # whole as a sum: its terms are not
            return f"floor_div({_c(over)}, {_c(under)})"
        return "(" + " + ".join(map(_c, dim.args)) + ")"
    if dim.is_Mul:
        over, under = dim.as_numer_denom()
        if under != 1:
            return f"floor_div({_c(over)}, {_c(under)})"
        return "(" + " * ".join(map(_c, dim.args)) + ")"
    if dim.is_Pow and dim.exp.is_Integer and dim.exp > 0:
        return "(" + " * ".join([_c(dim.base)] * int(dim.exp)) + ")"
    if isinstance(dim, (sympy.floor, sympy.ceiling)):
        over, under = sympy.together(dim.args[0]).as_numer_denom()
        if isinstance(dim, sympy.ceiling):
            over = over + under - 1
        return f"floor_div({_c(over)}, {_c(under)})"
    if isinstance(dim, sympy.Mod):
        a, b = map(_c, dim.args)
        return f"({a} - floor_div({a}, {b}) * {b})"
    if isinstance(dim, (sympy.Max, sympy.Min)):
        name = "larger" if isinstance(dim, sympy.Max) else "smaller"
        result = _c(dim.args[0])
        for part in dim.args[1:]:
            result = f"{name}({result}, {_c(part)})"
        return result
    raise BackendError(f"a size uses a function that kernels do not know: {dim}")
