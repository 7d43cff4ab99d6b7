"""The section of docs/benchmarks.md on attention, from benchmarks/results/gpu_attention.json."""

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
        "`scaled_dot_product_attention` chooses from, flex_attention is compiled; a dash: the",
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
