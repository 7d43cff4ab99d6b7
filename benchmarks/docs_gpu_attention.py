"""The sections of docs/benchmarks.md on attention, from benchmarks/results/gpu_attention.json and
gpu_cached.json."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import geometric_mean

_PEERS = {
    "cudnn": "cuDNN",
    "flash": "FlashAttention-2",
    "efficient": "memory-efficient",
    "flex": "flex_attention",
}


def attention_lines(data: dict[str, Any]) -> list[str]:
    """One row a case: TFLOP/s of accel's kernel and of PyTorch's, and the ratio to the best."""
    lines = [
        "## GPU, attention",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}.",
        "",
        "Microseconds (TFLOP/s) of a call in a CUDA graph. FLOPs are those of the pairs of query",
        "and key that the mask lets through. The first three peers are kernels that",
        "`scaled_dot_product_attention` chooses from (with a mask of all pairs for texts in one",
        "row), flex_attention is compiled, its blocks made before; a dash: the",
        "system refuses the case, or has no such mask. `error` is accel's largest one, relative to",
        "the largest value, against float64. A star: the compiler leaves the case to the library",
        "(cuDNN's kernel, the memory-efficient one for float32); its own one is shown.",
        "",
        f"| attention | accel | {' | '.join(_PEERS.values())} | best peer / accel | error |",
        "|---|---|" + "---|" * len(_PEERS) + "---|---|",
    ]
    ratios = []
    for row in data["rows"]:
        systems, flops = row["systems"], row["flops"]
        own = systems["accel"]
        peers = [systems[p]["seconds"] for p in _PEERS if p in systems]
        ratio = "-"
        if peers:
            best = min(peers) / own["seconds"]
            ratio = f"{best:.2f}"
            ratios.append(1.0 if row["library"] else best)
        cells = [_cell(systems.get(name), flops) for name in ("accel", *_PEERS)]
        star = " *" if row["library"] else ""
        lines.append(
            f"| {row['case']}{star} | {' | '.join(cells)} | {ratio} | {own['error']:.0e} |"
        )
    mean = geometric_mean(ratios)
    return [
        *lines,
        "",
        f"Geometric mean of the last ratio, 1 where the library is chosen: {mean:.2f}.",
        "",
    ]


def _cell(system: dict[str, float] | None, flops: float) -> str:
    if system is None:
        return "-"
    return f"{1e6 * system['seconds']:.1f} ({flops / system['seconds'] / 1e12:.0f})"


def cached_lines(data: dict[str, Any]) -> list[str]:
    """One row a case: microseconds and TB/s over a contiguous cache, one in pages, and peers'."""
    names = {"accel": "accel", "pages": "accel, pages of 16"} | _PEERS
    names = {n: t for n, t in names.items() if any(n in row["systems"] for row in data["rows"])}
    lines = [
        "## GPU, attention over a cache",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}.",
        "",
        "One new token, bfloat16; microseconds (TB/s of keys and values). accel's kernel writes",
        "the new keys and values, too, where the cache is contiguous; caches come from memory.",
        "",
        f"| attention | MB | {' | '.join(names.values())} | best peer / accel | error |",
        "|---|---|" + "---|" * len(names) + "---|---|",
    ]
    ratios = []
    for row in data["rows"]:
        systems, read = row["systems"], row["bytes"]
        peers = [systems[p]["seconds"] for p in _PEERS if p in systems]
        ratios.append(min(peers) / systems["accel"]["seconds"])
        cells = []
        for name in names:
            seconds = systems[name]["seconds"] if name in systems else None
            speed = "-" if seconds is None else f"{1e6 * seconds:.1f} ({read / seconds / 1e12:.2f})"
            cells.append(speed)
        error = max(one["error"] for n, one in systems.items() if n in ("accel", "pages"))
        lines.append(
            f"| {row['case']} | {read / 1e6:.0f} | {' | '.join(cells)} | {ratios[-1]:.2f} "
            f"| {error:.0e} |"
        )
    return [*lines, "", f"Geometric mean of the last ratio: {geometric_mean(ratios):.2f}.", ""]
