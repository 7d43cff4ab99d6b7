"""Bytes, perplexity and speed of SmolLM2-135M with each kind of key/value cache.

    python -m benchmarks.kv_cache --windows 8
    python -m benchmarks.kv_cache --method int8 --method paged
    python -m benchmarks.kv_cache --speed          # tokens a second of every kind
    python -m benchmarks.kv_cache --long sinks     # 8192 tokens, one after the other

What attention reads is encoded and decoded on whole texts, which gives every token the logits that
decoding it from such a cache gives: `insert_kv_cache` keeps exactly what decoding reads, and its
contract is checked. Caches that keep other tokens (`STREAMED`) are measured token by token, on the
first windows. Perplexity is on CPython's own `pydoc_data.topics`, in windows of 1024 tokens.
Results go to `benchmarks/results/kv_cache.json`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from accel.compiler.language import compile_generator
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint
from accel.frontends.export import capture
from accel.ir import Module, Value
from accel.passes.base import Context
from accel.passes.manager import run_pipeline
from accel.passes.narrow import stored
from accel.passes.pipelines import CLEAN_PIPELINE
from accel.runtime.model import CompiledModel
from accel.runtime.pages import PagedLoop
from benchmarks.compression import MODEL, WINDOW, perplexity, windows
from benchmarks.docs_language import SPEED_HEADS, cells
from benchmarks.measure import THREADS, load_results, machine, store_results

METHODS: dict[str, str] = {
    "float32": "",
    "int8": "quantize_cache",
    "int8, not rotated": "quantize_cache{rotate=false}",
    "fp8": "quantize_cache{format=fp8}",
    "fp8, not rotated": "quantize_cache{format=fp8,rotate=false}",
    "int4-g32": "quantize_cache{format=int4,group=32}",
    "int4-g32, as it is": "quantize_cache{format=int4,group=32,rotate=false,center=0}",
    "int4-g16": "quantize_cache{format=int4,group=16}",
}
# Kinds whose perplexity is measured by decoding, with the passes that `cache=` takes.
STREAMED: dict[str, str] = {
    "paged": "page_cache",
    "heavy 256, recent 256": "evict_cache{heavy=256,recent=256}",
    "heavy 128, recent 128": "evict_cache{heavy=128,recent=128}",
    "recent 256": "stream_cache{sinks=0,window=256}",
    "sinks 4, recent 252": "stream_cache{sinks=4,window=252}",
}
# Kinds whose speed is measured, after few tokens and, if they keep them all, after many.
SPEED: dict[str, str] = {
    "float32": "",
    "int8": "int8",
    "fp8": "fp8",
    "int4-g16": METHODS["int4-g16"],
    **STREAMED,
}
LONG_TEXT = 8192
LONG: dict[str, str] = {
    "full": "",
    "window": "stream_cache{sinks=0,window=1024}",
    "sinks": "stream_cache{sinks=4,window=1020}",
}
_STREAMED_WINDOWS = 2
_CONTEXT, _LONG_CONTEXT = 512, 4096
_ROUNDS, _STEPS = 6, 8


def token_bytes(module: Module) -> int:
    """Bytes that the cache keeps of one token."""
    kept: dict[Value, None] = {}
    for op in module.main.ops:
        if op.name == "attention":
            kept |= dict.fromkeys((*stored(op.operands[1]), *stored(op.operands[2])))
    return sum(int(value.type.nbytes()) // int(value.shape[2]) for value in kept)


def measure(base: Module, method: str, tokens: Sequence[torch.Tensor]) -> dict[str, Any]:
    """One row: a copy of `base` with its keys and values encoded."""
    module = base.clone()
    context = Context(calibration=[[tokens[0]]])
    row = None
    if METHODS[method]:
        row = run_pipeline(module, METHODS[method], context).rows[0]
    return {
        "pipeline": METHODS[method],
        "bytes": token_bytes(module),
        "error": row.error if row is not None else 0.0,
        "promise": row.contract if row is not None else "exact",
        "perplexity": perplexity(module, tokens),
    }


def streamed(name: str, tokens: Sequence[torch.Tensor], rows: dict[str, Any]) -> dict[str, Any]:
    """One row of a kind that is measured token by token, beside float32 on the same tokens."""
    capacity = tokens[0].shape[1]
    fast = compile_generator(_model(), capacity=capacity, cache=STREAMED[name])
    losses = [loss for window in tokens for loss in token_losses(fast, window)]
    reference = rows["float32"]["first_windows"]
    return {
        "pipeline": STREAMED[name],
        "bytes": state_bytes(fast) // capacity,
        "error": None,
        "promise": "approximate" if name != "paged" else "exact",
        "perplexity": math.exp(statistics.fmean(losses)),
        "reference": reference,
        "windows": len(tokens),
    }


def token_losses(fast: CompiledModel, ids: torch.Tensor, piece: int = 1) -> Iterator[float]:
    """The negative log likelihood of each token of a text [1, n] given those before it."""
    loop = fast.generator.loop
    with torch.no_grad():
        logits, state = loop.prefill(ids[:, :1], loop.empty(1))
        yield float(F.cross_entropy(logits, ids[:, 1]))
        at, last = 1, ids.shape[1] - 1
        while at < last:
            count = min(piece, last - at)
            position = torch.tensor(at)
            if piece > 1:
                logits, state = loop.extend(ids[:, at : at + count], position, state)
                logits = logits[0]
            else:
                logits, state = loop.decode(ids[:, at], position, state)
            wanted = ids[0, at + 1 : at + count + 1]
            yield from F.cross_entropy(logits, wanted, reduction="none").tolist()
            at += count


def state_bytes(fast: CompiledModel) -> int:
    """Bytes of the state of one text as long as the capacity; of a pool, all its pages."""
    loop = fast.generator.loop
    if isinstance(loop, PagedLoop):
        return loop.pool.nbytes()
    return sum(t.nbytes for t in loop.empty(1))


class Steps:
    """Decoding with one kind of cache after `context` tokens."""

    def __init__(self, name: str, context: int) -> None:
        fast = compile_generator(_model(), capacity=context + 512, cache=SPEED[name])
        self.loop, self.at = fast.generator.loop, context
        ids = torch.randint(0, 1000, (1, context), generator=torch.Generator().manual_seed(0))
        self.logits, self.state = self.loop.prefill(ids, self.loop.empty(1))
        self.seconds: list[float] = []

    def run(self, count: int) -> None:
        """So many steps; the first two warm up."""
        for number in range(count):
            token, place = self.logits.argmax(-1), torch.tensor(self.at)
            start = time.perf_counter()
            self.logits, self.state = self.loop.decode(token, place, self.state)
            if number > 1:
                self.seconds.append(time.perf_counter() - start)
            self.at += 1


@torch.no_grad()
def speeds(context: int, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Tokens a second of each kind, and of float32 in turns with it: how fast memory is differs
    from minute to minute."""
    full, made = Steps("float32", context), {}
    for name in names:
        other = full if name == "float32" else Steps(name, context)
        full.seconds.clear()
        full.at = context
        for _ in range(_ROUNDS):
            full.run(_STEPS)
            if other is not full:
                other.run(_STEPS)
        rates = [1 / statistics.median(s.seconds) for s in (other, full)]
        made[name] = (rates[0], rates[1])
    return made


def long_text(name: str) -> dict[str, Any]:
    """Perplexity of 8192 tokens in a row, whole and in eighths."""
    (ids,) = windows(1, LONG_TEXT)
    piece = 128 if not LONG[name] else 1
    fast = compile_generator(
        _model(), capacity=LONG_TEXT, cache=LONG[name], extend=piece if piece > 1 else 0
    )
    losses = torch.tensor(list(token_losses(fast, ids, piece)), dtype=torch.float64)
    return {
        "pipeline": LONG[name],
        "bytes": state_bytes(fast),
        "perplexity": float(losses.mean().exp()),
        "eighths": [float(part.mean().exp()) for part in losses.chunk(8)],
    }


def _model() -> Any:
    return load_checkpoint(find_checkpoint(MODEL))


def table_of(data: dict[str, Any]) -> Table:
    title = f"SmolLM2-135M, {data['windows']} windows of {WINDOW} tokens"
    names = ("bytes a token", "of 16 bits", "logits' error", "perplexity", "change", *SPEED_HEADS)
    table = Table("cache", "passes", title=title)
    for name in names:
        table.add_column(name, justify="right")
    for name, row in data["rows"].items():
        table.add_row(name, row["pipeline"], *cells(row, data["rows"]["float32"]))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bytes, perplexity and speed of caches.")
    parser.add_argument("--windows", type=int, default=8, help="windows of 1024 tokens")
    known = sorted([*METHODS, *STREAMED])
    parser.add_argument("--method", action="append", choices=known, help="repeatable")
    parser.add_argument("--speed", action="store_true", help="only tokens a second")
    parser.add_argument("--long", action="append", choices=sorted(LONG), help="only 8192 tokens")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    data = load_results("kv_cache")
    if data.get("windows") != given.windows:
        data = {"windows": given.windows, "window": WINDOW, "rows": {}}
    data["machine"] = machine()
    if given.speed:
        measure_speed(data)
    for name in given.long or ():
        data.setdefault("long", {})[name] = long_text(name)
        store(data)
    if not given.speed and not given.long:
        measure_rows(data, given.method or [*METHODS, *STREAMED])
    Console().print(table_of(data))


def measure_rows(data: dict[str, Any], wanted: Sequence[str]) -> None:
    """Perplexity; every row is compared with the first."""
    tokens, rows = windows(data["windows"]), data["rows"]
    whole = [n for n in wanted if n in METHODS]
    if "float32" not in rows or "first_windows" not in rows["float32"]:
        whole = list(dict.fromkeys(["float32", *whole]))
    if whole:
        base = capture(_model(), (tokens[0],))
        run_pipeline(base, list(CLEAN_PIPELINE))
        for name in whole:
            rows[name] = {**rows.get(name, {}), **measure(base, name, tokens)}
            if name == "float32":
                rows[name]["first_windows"] = perplexity(base, tokens[:_STREAMED_WINDOWS])
            store(data)
        del base
    for name in [n for n in wanted if n in STREAMED]:
        rows[name] = {**rows.get(name, {}), **streamed(name, tokens[:_STREAMED_WINDOWS], rows)}
        store(data)


def measure_speed(data: dict[str, Any]) -> None:
    """After few tokens; and after many, of the kinds that keep them all."""
    known = [n for n in SPEED if n in data["rows"]]
    whole = [n for n in known if n in METHODS or n == "paged"]
    for context, names in ((_CONTEXT, known), (_LONG_CONTEXT, whole)):
        for name, (rate, full) in speeds(context, names).items():
            found = data["rows"][name].setdefault("speed", {})
            found[str(context)] = {"tokens_per_second": rate, "of_float32": rate / full}
        store(data)


def store(data: dict[str, Any]) -> None:
    names = [*METHODS, *STREAMED]
    rows = {n: data["rows"][n] for n in names if n in data["rows"]}
    store_results("kv_cache", {**data, "rows": rows})


if __name__ == "__main__":
    main()
