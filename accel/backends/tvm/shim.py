"""The C side of a kernel library: entry points, scratch memory, and sharing rows among threads.

Generated code must not bring a second thread pool: two pools that spin on the same cores cost
milliseconds. So `accel_use_pool` is given the addresses of the OpenMP entry points that torch has
loaded already, and every kernel runs on torch's own threads. Without them kernels run serially.

A kernel alone starts its threads for each phase that is worth it. A sequence of kernels starts them
once: each thread has a *seat* in a *team* and walks through all kernels, computing its share of the
rows. Between phases they meet at a barrier, which costs a tenth of a start. Small phases are seat
0's. Who waits meanwhile fetches what the next kernel reads of the weights: a step of a language
model is limited by memory, which so is never idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from accel.backends.tvm.kernel import KernelCode, PhaseCode
from accel.errors import BackendError
from accel.ir.types import Dim, numerator

# Element operations below which a phase is not worth waking another thread for.
_GRAIN = 1 << 15
_SPINS = 2000  # some ten microseconds of waiting before a thread lets others have its core
_MOST_AHEAD = 256 << 10  # bytes a thread fetches while it waits: a part of its second-level cache

_PRELUDE = r"""
#include <sched.h>
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

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void pause_spinning(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

typedef struct frame {
    void (*rows)(struct frame *, int64_t, int64_t);
    const int64_t *words;
    char **scratch;
    int *status;
    int64_t count;
} frame;

typedef struct team { /* what all seats see */
    _Alignas(64) int64_t arrived; /* at meetings, all together */
    _Alignas(64) int64_t meeting; /* the last one that is over */
    _Alignas(64) int status[2];   /* of the last two kernels that can fail */
    const int64_t *table;
    int64_t count, failed;
    char *memory;
} team;

typedef struct seat {
    team *team; /* 0: a kernel alone */
    int64_t number, threads, meeting, checks;
    enum { NOTHING, SHARED, SMALL } last; /* the phase before */
    const char *ahead, *end, *target;     /* lines of weights to fetch while waiting */
} seat;

typedef struct kernel {
    int32_t (*run)(seat *, const int64_t *words, char *memory);
    int64_t (*scratch)(const int64_t *words);              /* bytes */
    int (*is_large)(const int64_t *words, int64_t threads); /* whether any phase is shared */
} kernel;

static int shares(int64_t count, int64_t cost, int64_t threads) {
    return parallel && threads > 1 && count > 1 && (double)count * (double)cost > GRAIN;
}

static void share(frame *f, int64_t i, int64_t n) {
    int64_t begin = f->count * i / n, end = f->count * (i + 1) / n;
    if (f->count > 64 * n) { /* whole cache lines, where rows are single elements */
        begin = begin / 16 * 16;
        if (i + 1 < n) end = end / 16 * 16;
    }
    if (begin < end) f->rows(f, begin, end);
}

static void share_alone(void *data) { share((frame *)data, thread_number(), thread_count()); }

/* Waits until all seats are here. */
static void meet(seat *s) {
    team *t = s->team;
    int64_t meeting = ++s->meeting;
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == meeting * s->threads) {
        __atomic_store_n(&t->meeting, meeting, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t i = 0; __atomic_load_n(&t->meeting, __ATOMIC_ACQUIRE) < meeting;) {
        if (s->ahead < s->end) {
            for (int line = 0; line < 4; line++, s->ahead += 64) __builtin_prefetch(s->ahead, 0, 2);
        } else if (i++ < SPINS) {
            pause_spinning();
        } else {
            sched_yield(); /* more threads than cores */
        }
    }
}

static void run(seat *s, frame *f, int64_t count, int64_t cost) {
    f->count = count;
    int shared = shares(count, cost, s->threads);
    if (!s->team) {
        if (shared)
            parallel(share_alone, f, (unsigned)smaller(s->threads, count), 0);
        else if (count > 0)
            f->rows(f, 0, count);
        return;
    }
    if (s->last == SHARED || (shared && s->last == SMALL)) meet(s);
    s->last = shared ? SHARED : SMALL;
    if (shared)
        share(f, s->number, s->threads);
    else if (s->number == 0 && count > 0)
        f->rows(f, 0, count);
}

/* Where a kernel that can fail reports it. */
static int *status_of(seat *s, int *own) { return s->team ? &s->team->status[s->checks & 1] : own; }

/* What it reported, the same for all seats: the place is used again only after another meeting. */
static int report(seat *s, const int *status) {
    if (s->team) {
        meet(s);
        s->last = NOTHING;
        s->checks++;
    }
    return *status;
}

static int32_t run_alone(const kernel *k, const int64_t *words, int64_t threads) {
    seat s = {0, 0, threads, 0, 0, NOTHING, 0, 0, 0};
    int64_t bytes = k->scratch(words);
    char *memory = bytes ? aligned_alloc(64, bytes) : 0;
    if (bytes && !memory) return 2;
    int32_t code = k->run(&s, words, memory);
    free(memory);
    return code;
}

static void walk(seat *s, team *t) {
    for (int64_t i = 0; i < t->count; i++) {
        const int64_t *row = t->table + 4 * i;
        if ((const char *)row[2] != s->target) {
            s->target = (const char *)row[2];
            s->ahead = s->target + row[3] * s->number / s->threads / 64 * 64;
            s->end = s->ahead + smaller(row[3] / s->threads, MOST_AHEAD) / 256 * 256;
        }
        int32_t code = ((const kernel *)row[0])->run(s, (const int64_t *)row[1], t->memory);
        if (code) {
            if (s->number == 0) t->failed = 4 * i + code;
            return;
        }
    }
}

static void sit(void *data) {
    seat s = {(team *)data, thread_number(), thread_count(), 0, 0, NOTHING, 0, 0, 0};
    walk(&s, s.team);
}

/* Kernels one after the other: rows of a kernel, its words, and the address and size of weights
   that a later one reads. -1, or 4 * (number of the kernel that failed) + its code. */
int64_t accel_run_kernels(const int64_t *table, int64_t count, int64_t threads) {
    int64_t large = 0, bytes = 0;
    for (int64_t i = 0; i < count; i++) {
        const kernel *k = (const kernel *)table[4 * i];
        const int64_t *words = (const int64_t *)table[4 * i + 1];
        large += k->is_large(words, threads);
        bytes = larger(bytes, k->scratch(words));
    }
    team t = {0, 0, {0, 0}, table, count, -1, 0};
    if (bytes && !(t.memory = aligned_alloc(64, bytes))) return 2;
    if (large) {
        parallel(sit, &t, (unsigned)threads, 0);
    } else {
        seat s = {0, 0, 1, 0, 0, NOTHING, 0, 0, 0};
        walk(&s, &t);
    }
    free(t.memory);
    return t.failed;
}
"""


def c_source(kernels: Sequence[KernelCode]) -> str:
    """One C file for a library: `int32_t NAME(const int64_t *words, int64_t threads)` a kernel,
    and `NAME_kernel`, its row in a sequence.

    A kernel returns 0, 1 if an index was out of range, 2 if there was no memory for scratch.
    """
    numbers = {"GRAIN": _GRAIN, "SPINS": _SPINS, "MOST_AHEAD": _MOST_AHEAD}
    prelude = _PRELUDE.strip()
    for name, number in numbers.items():
        prelude = prelude.replace(name, str(number))
    return "\n\n".join([prelude, *map(_kernel, kernels)]) + "\n"


def _kernel(kernel: KernelCode) -> str:
    name = kernel.name
    sizes = [f"(({_c(size)}) + 63) / 64 * 64" for size in kernel.scratch]
    large = [f"shares({_c(p.rows)}, {_c(p.cost)}, threads)" for p in kernel.phases]
    run = [f"static int32_t {name}_run(seat *s, const int64_t *words, char *memory) {{"]
    run += [*_symbols(kernel), "    int own = 0;"]
    run.append(f"    int *status = {'status_of(s, &own)' if kernel.can_fail else '&own'};")
    if kernel.scratch:
        run.append(f"    char *scratch[{len(sizes)}];")
        for i in range(len(sizes)):
            run.append(f"    scratch[{i}] = memory + ({' + '.join(['0', *sizes[:i]])});")
    pointer = "scratch" if kernel.scratch else "0"
    run.append(f"    frame f = {{0, words, {pointer}, status, 0}};")
    for phase in kernel.phases:
        run.append(f"    f.rows = {phase.name}_rows;")
        run.append(f"    run(s, &f, {_c(phase.rows)}, {_c(phase.cost)});")
    run += [f"    return {'report(s, status)' if kernel.can_fail else '0'};", "}"]
    lines = [_phase(kernel, p) for p in kernel.phases]
    lines += run
    lines += [f"static int64_t {name}_scratch(const int64_t *words) {{", *_symbols(kernel)]
    lines += [f"    return {' + '.join(sizes) or '0'};", "}"]
    lines += [f"static int {name}_is_large(const int64_t *words, int64_t threads) {{"]
    lines += [*_symbols(kernel), f"    return {' || '.join(large) or '0'};", "}"]
    lines.append(f"const kernel {name}_kernel = {{{name}_run, {name}_scratch, {name}_is_large}};")
    lines.append(f"int32_t {name}(const int64_t *words, int64_t threads) {{")
    lines += [f"    return run_alone(&{name}_kernel, words, threads);", "}"]
    return "\n".join(lines)


def _symbols(kernel: KernelCode) -> list[str]:
    """The sizes among the words, by name."""
    first = kernel.inputs + kernel.results
    names = enumerate(kernel.symbols, first)
    return [f"    const int64_t {s} = words[{i}]; (void){s};" for i, s in names]


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
