"""Generation on one GPU beside PyTorch: decode steps, prefill, whole texts.

    python -m benchmarks.gpu_decode [--rows 1b_decode,8b_decode] [--systems accel,...] [--out FILE]
                                    [--caches FOLDER] [--limit SECONDS] [--roofline]
                                    [--from-cache ROWS]

Shapes of Llama-3.2-1B and Llama-3-8B in bfloat16, random weights made on the device. All systems
of a row run in this process, on the same weights, one after another; CUDA graphs are allowed to
all. accel compiles the plain model of `transformers`; Inductor gets a model written for it
(`benchmarks.static_llama`) in three modes; `transformers` runs with its static cache. Each system's
logits are compared with eager float32 before it is timed.

Whole texts are `generate` of `transformers` too: eager with its dynamic cache, and with its static
cache and torch.compile, as it compiles by itself on a GPU. A system that is not ready within
`--limit` seconds gets a row that says so. A decode step is everything that a token costs on the
device, its choice (greedy) included for accel; figures are medians. `--caches` and `--roofline` are
those of `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accel
from benchmarks import peer_caches
from benchmarks.bounded import OutOfTime, at_most
from benchmarks.docs_gpu_decode import NEW, text_line
from benchmarks.from_cache import from_cache
from benchmarks.gpu_roofline import Options, Program, add_options, measure_all, parts_of
from benchmarks.measure import RESULTS, machine, merged
from benchmarks.static_llama import StaticLlama

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "head_dim": 64, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "head_dim": 128, "tie_word_embeddings": False},
}  # fmt: skip
LEAST_ERROR = 2.0  # times the error of eager bfloat16: rounding in another order
INDUCTOR = {"inductor-reduce-overhead": "reduce-overhead", "inductor": None,
            "inductor-max-autotune": "max-autotune"}  # fmt: skip
MOST_MILLISECONDS = 4000.0  # rounds of one system on one workload; one is always timed
TEXTS_ONLY = ("transformers-compile",)


@dataclass(frozen=True)
class Workload:
    """What is timed: a decode step after `context` tokens, a prompt of so many, or a whole text."""

    shape: str
    kind: str  # "decode", "prefill", "text"
    context: int
    batch: int = 1

    @property
    def capacity(self) -> int:
        return self.context + (NEW if self.kind == "text" else 128)


ROWS = {
    "1b_decode": Workload("1b", "decode", 1024),
    "8b_decode": Workload("8b", "decode", 1024),
    "8b_decode_b32": Workload("8b", "decode", 1024, 32),
    "8b_decode_32k": Workload("8b", "decode", 32768),
    "1b_prefill": Workload("1b", "prefill", 2048),
    "8b_prefill": Workload("8b", "prefill", 2048),
    "1b_text": Workload("1b", "text", 128),
    "8b_text": Workload("8b", "text", 128),
}


@dataclass
class Row:
    """One system on one workload.

    `milliseconds` of a step, a prompt or a text of 128 + 256 tokens; None if the system was not
    ready in time, and `compile_seconds` is that time (None: not from nothing). `error` of the
    logits is relative to the largest one, against eager float32 (None where that takes too long).
    `host_microseconds`: what a call costs the host, which does not wait for its end. Of accel's
    texts: `step_milliseconds` of a step in the middle of the text, and `prompt_milliseconds` of the
    prompt, by themselves; what else the text takes is the loop around them. `from_cache_seconds`:
    until accel is ready in a new process that finds its kernels in the cache.
    """

    workload: str
    system: str
    milliseconds: float | None
    compile_seconds: float | None
    error: float | None
    host_microseconds: float | None = None
    step_milliseconds: float | None = None
    prompt_milliseconds: float | None = None
    from_cache_seconds: float | None = None


def build(shape: str) -> Any:
    """The model of `transformers` with random weights, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        max_position_embeddings=65536, rope_theta=500000.0, **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model = model.to_empty(device="cuda").eval()
    for name, weight in model.named_parameters():
        weight.data.normal_(1.0 if "norm" in name else 0.0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).cuda()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


class Accel:
    """accel on the plain model."""

    def __init__(self, model: Any, work: Workload) -> None:
        target = "h200" if "H200" in torch.cuda.get_device_name() else "h100"
        self.work = work
        self.fast = accel.compile_generator(
            model, capacity=work.capacity, batch=work.batch, target=target
        )
        self.loop: Any = self.fast.generator.loop

    def logits(self, ids: Tensor) -> Tensor:
        """After a prompt; for decoding, its last token is a step."""
        if self.work.kind == "prefill":
            return self.loop.prefill(ids, self.loop.empty(len(ids)))[0]
        _, state = self.loop.prefill(ids[:, :-1], self.loop.empty(len(ids)))
        place = torch.tensor(ids.shape[1] - 1, device="cuda")
        made: Tensor = self.loop.decode(ids[:, -1], place, state)[0]
        return made

    def call(self, ids: Tensor) -> Callable[[], Any]:
        if self.work.kind == "text":
            return lambda: self.fast.generate(ids, max_new_tokens=NEW)
        if self.work.kind == "prefill":
            state = self.loop.empty(len(ids))
            return lambda: self.loop.prefill(ids, state)
        return self.step(ids)

    def step(self, ids: Tensor, after: int = 0) -> Callable[[], None]:
        """A step so many tokens after a prompt; each call goes one further."""
        made: Callable[[], None] = self.loop.step_from(len(ids), ids.shape[1] + after)
        return made

    def parts(self, ids: Tensor) -> tuple[float, float]:
        """What a text consists of: milliseconds of a step in its middle, and of the prompt."""
        state = self.loop.empty(len(ids))
        step = time_calls(self.step(ids, NEW // 2), "decode")
        return step, time_calls(lambda: self.loop.prefill(ids, state), "prefill")

    def program(self, name: str, ids: Tensor, milliseconds: float) -> Program:
        """What a call runs: the prompt, or a step with the choice of the next token."""
        model, rows = self.fast, len(ids)
        state = self.loop.empty(rows)
        if self.work.kind == "prefill":
            return Program(name, parts_of(model, ("prefill", [ids, *state])), milliseconds)
        logits, state = self.loop.prefill(ids[:, :-1], state)
        places = model.entry_points["decode"].function.signature.arguments[1].shape
        place = torch.full([rows] * len(places), ids.shape[1] - 1, device="cuda")
        last = ids[:, -1:].clone()
        history = torch.zeros(rows, self.work.capacity + 2, dtype=torch.int64, device="cuda")
        step, choice = [last, place, *state], [logits[:, None], last, place, history]
        parts = parts_of(model, ("decode", step), ("advance", choice))
        return Program(name, parts, milliseconds)


class Static:
    """The model written for Inductor, compiled in a mode of torch.compile."""

    def __init__(self, model: Any, work: Workload, mode: str | None) -> None:
        torch._dynamo.reset()
        self.work = work
        self.plain = StaticLlama(model, work.batch, work.capacity)
        self.step = torch.compile(self.plain, mode=mode, fullgraph=True)
        self.tokens = torch.arange(work.capacity, device="cuda")
        self.run = self.step if work.kind == "prefill" else self.plain

    def logits(self, ids: Tensor) -> Tensor:
        last = ids.shape[1] - 1
        if self.work.kind == "prefill":
            return self.run(ids, self.tokens[: last + 1])[:, -1].clone()
        self.plain(ids[:, :-1], self.tokens[:last])
        return self.step(ids[:, -1:], self.tokens[last : last + 1])[:, -1].clone()

    def call(self, ids: Tensor) -> Callable[[], Any]:
        if self.work.kind == "text":
            return lambda: self._text(ids)
        if self.work.kind == "prefill":
            return lambda: self.run(ids, self.tokens[: ids.shape[1]])
        place = self.tokens[ids.shape[1] - 1 : ids.shape[1]].clone()
        last = ids[:, -1:].clone()
        return lambda: self.step(last, place)

    def _text(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        token = self.plain(ids, self.tokens[:count])[:, -1].argmax(-1, keepdim=True)
        place = self.tokens[count : count + 1].clone()
        made = [token]
        for _ in range(NEW - 1):
            token = self.step(token, place)[:, -1].argmax(-1, keepdim=True)
            made.append(token)
            place += 1
        return torch.cat(made, 1)


class Transformers:
    """The model of `transformers` itself, eager, with its static cache; whole texts by its own
    `generate`, with its dynamic cache or, compiled, its static one."""

    def __init__(self, model: Any, work: Workload, compiled: bool = False) -> None:
        self.model, self.work, self.compiled = model, work, compiled

    def _cache(self, ids: Tensor) -> Any:
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self.work.capacity)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def logits(self, ids: Tensor) -> Tensor:
        made: Tensor = self.model(ids, logits_to_keep=1, use_cache=False).logits[:, -1]
        return made

    def call(self, ids: Tensor) -> Callable[[], Any]:
        if self.work.kind == "prefill":
            return lambda: self.model(ids, logits_to_keep=1, use_cache=False)
        if self.work.kind == "text":
            options: dict[str, Any] = {"do_sample": False, "disable_compile": not self.compiled}
            if self.compiled:
                options["cache_implementation"] = "static"
            return lambda: self.model.generate(
                ids, max_new_tokens=NEW, min_new_tokens=NEW, **options
            )
        cache = self._cache(ids[:, :-1])
        last = ids[:, -1:].clone()
        return lambda: self.model(last, past_key_values=cache, logits_to_keep=1)


def systems() -> dict[str, Callable[[Any, Workload], Any]]:
    made: dict[str, Callable[[Any, Workload], Any]] = {
        "transformers": Transformers,
        "transformers-compile": partial(Transformers, compiled=True),
    }
    for name, mode in INDUCTOR.items():
        made[name] = partial(Static, mode=mode)
    made["accel"] = Accel
    return made


def time_calls(call: Callable[[], Any], kind: str) -> float:
    """Median milliseconds of a call: by events on the device, whole texts by the clock."""
    rounds, calls = {"decode": (7, 8), "prefill": (5, 3), "text": (3, 1)}[kind]
    for _ in range(0 if kind == "text" else 3):  # a text has warmed up by itself
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(rounds):
        if sum(times) > MOST_MILLISECONDS:
            break
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize()
        clock = 1e3 * (time.perf_counter() - start)
        times.append((clock if kind == "text" else first.elapsed_time(last)) / calls)
    return statistics.median(times)


def host_time(call: Callable[[], Any]) -> float:
    """Median microseconds until a call returns, the device idle before."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


@torch.no_grad()
def exact_logits(model: Any, ids: Tensor) -> Tensor:
    """Eager float32, on the same weights, of the first row."""
    wide = copy.deepcopy(model).float()
    made: Tensor = wide(ids[:1], logits_to_keep=1, use_cache=False).logits[:, -1]
    del wide
    gc.collect()
    torch.cuda.empty_cache()
    return made


@torch.no_grad()
def measure(name: str, model: Any, chosen: Sequence[str], options: Options) -> list[Row]:
    """One workload: a row for every system."""
    work = ROWS[name]
    ids = tokens(work)
    exact = exact_logits(model, ids) if work.context <= 4096 else None
    allowed = 0.0 if exact is None else _error(Transformers(model, work).logits(ids), exact)
    rows: list[Row] = []
    with peer_caches.row_caches(options.caches, name) as fresh:
        for system in chosen:
            if system in TEXTS_ONLY and work.kind != "text":
                continue
            try:
                from_nothing = fresh(system)
                start = time.perf_counter()
                with at_most(options.limit):
                    made, got, call = _start(model, work, system, ids)
            except (OutOfTime, peer_caches.NotReady) as late:
                rows.append(Row(name, system, None, getattr(late, "seconds", options.limit), None))
                print(f"{name:14} {system:26} {late}", flush=True)
                if isinstance(late, OutOfTime):
                    peer_caches.end_compiling()
                continue
            seconds = time.perf_counter() - start if from_nothing else None
            error = None if exact is None else _error(got, exact)
            if error is not None and error > LEAST_ERROR * allowed:
                raise RuntimeError(f"{system} on {name} is off by {error}, eager by {allowed}")
            row = _timed(name, system, made, call, ids, options.programs)
            row.compile_seconds, row.error = seconds, error
            if system == "accel" and name in options.from_cache:
                row.from_cache_seconds = from_cache(name)
            rows.append(row)
            print(f"{name:14} {system:26} {row.milliseconds:9.3f} ms  ready {seconds} s  error "
                  f"{error}  host {row.host_microseconds} us  from cache {row.from_cache_seconds}",
                  flush=True)  # fmt: skip
            del made, got, call
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def _timed(
    name: str,
    system: str,
    made: Any,
    call: Callable[[], Any],
    ids: Tensor,
    programs: list[Program] | None,
) -> Row:
    """What a system's calls take; `programs` gets what accel ran."""
    kind = ROWS[name].kind
    host = host_time(call) if kind == "decode" else None
    milliseconds = time_calls(call, kind)
    row = Row(name, system, milliseconds, None, None, host)
    if isinstance(made, Accel) and kind == "text":
        row.step_milliseconds, row.prompt_milliseconds = made.parts(ids)
        print(f"{name:14} {text_line(asdict(row))}", flush=True)
    elif isinstance(made, Accel) and programs is not None:
        programs.append(made.program(name, ids, milliseconds))
    return row


def tokens(work: Workload) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 128256, (work.batch, work.context), device="cuda")


def _start(
    model: Any, work: Workload, system: str, ids: Tensor
) -> tuple[Any, Tensor, Callable[[], Any]]:
    """A system, its logits, and a call that is ready to be timed."""
    made = systems()[system](model, work)
    got = made.logits(ids)
    call = made.call(ids)
    for _ in range(1 if system == "transformers" and work.kind == "text" else 2):
        call()
    torch.cuda.synchronize()
    return made, got, call


def ready(name: str) -> Callable[[str], None]:
    """Compiles a system of a workload, and runs it: for `prepare_peers`."""
    work = ROWS[name]
    model, ids = build(work.shape), tokens(work)

    @torch.no_grad()
    def compile_one(system: str) -> None:
        _start(model, work, system, ids)
        gc.collect()
        torch.cuda.empty_cache()

    return compile_one


def _error(got: Tensor, exact: Tensor) -> float:
    scale = exact.double().abs().max().clamp(min=1e-6)
    return float((got[:1].double() - exact.double()).abs().max() / scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--systems", default=",".join(systems()))
    add_options(parser)
    parser.add_argument("--from-cache", default="", metavar="ROWS", help="accel once more, cached")
    parser.add_argument("--out", default=str(RESULTS / "gpu_decode.json"))
    chosen = parser.parse_args()
    path, names = Path(chosen.out), chosen.systems.split(",")
    options = replace(Options.of(chosen), from_cache=tuple(chosen.from_cache.split(",")))
    rows: list[Row] = []
    model, shape = None, ""
    for name in chosen.rows.split(","):
        if ROWS[name].shape != shape:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            shape = ROWS[name].shape
            model = build(shape)
        rows += measure(name, model, names, options)
        own = {r.system: r.milliseconds for r in rows if r.workload == name and r.milliseconds}
        peers = [v for k, v in own.items() if k != "accel"]
        if peers and "accel" in own:
            print(f"{name:14} best peer {min(peers):.3f} ms, ratio {min(peers) / own['accel']:.3f}",
                  flush=True)  # fmt: skip
        write(rows, path)
    measure_all(options.programs or [], path.with_name("gpu_roofline.json"))


def write(rows: list[Row], path: Path) -> None:
    """What was measured so far, and what the file has of other workloads."""
    facts = {**machine(), "gpu": torch.cuda.get_device_name()}
    made = merged(path, facts, [asdict(r) for r in rows], list(ROWS))
    result = {"machine": facts, "rows": made}
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
