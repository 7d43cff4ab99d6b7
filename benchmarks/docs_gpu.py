"""The GPU's section of docs/benchmarks.md, from benchmarks/results/gpu.json."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import geometric_mean

TITLES = {
    "bert_b1": "BERT-base, 128 tokens, B1",
    "bert_b32": "BERT-base, 128 tokens, B32",
    "vit_b1": "ViT-B/16 B1",
    "vit_b64": "ViT-B/16 B64",
    "llama1b_step_b1": "1B Llama, one token, no context",
    "resnet50_b1": "ResNet-50 B1",
    "resnet50_b64": "ResNet-50 B64",
    "mobilenetv3_b64": "MobileNetV3-L B64",
    "gpt2_train_b8": "GPT-2-small training step B8 S1024",
    "8b_decode": "8B Llama, a token after 1024",
    "8b_decode_b32": "8B Llama, a token after 1024, B32",
    "8b_decode_32k": "8B Llama, a token after 32768",
    "1b_decode": "1B Llama, a token after 1024",
    "8b_prefill": "8B Llama, prompt of 2048",
    "1b_prefill": "1B Llama, prompt of 2048",
}
_SYSTEMS = {
    "eager": "eager",
    "inductor": "Inductor",
    "inductor-reduce-overhead": "Inductor, reduce-overhead",
    "inductor-max-autotune": "Inductor, max-autotune",
    "accel": "accel",
}


def gpu_lines(data: dict[str, Any]) -> list[str]:
    """Milliseconds, ratio to the best peer, compile seconds, errors."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        rows.setdefault(row["workload"], {})[row["system"]] = row
    systems = [s for s in _SYSTEMS if any(s in r for r in rows.values())]
    head = [_SYSTEMS[s] for s in systems]
    lines = [
        "## GPU, 16 bits, exact passes only",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}.",
        "",
        "Milliseconds of a call (medians; CUDA graphs allowed to all), and how many times faster",
        "accel is than the best peer. A call of a training row is forward, backward and AdamW.",
        "",
        _row(["workload", *head, "ratio"]),
        _row(["---"] * (len(head) + 2)),
    ]
    for name, own in rows.items():
        cells = [time_cell(own.get(s)) for s in systems]
        ratio = ratio_of(own)
        lines.append(_row([name, *cells, f"{ratio:.2f}" if ratio else ""]))
    found = {name: ratio for name, own in rows.items() if (ratio := ratio_of(own))}
    lines += _row_of_mean(found, len(systems))
    lines += [
        "",
        "Seconds from the model to the third call with nothing cached (none for a peer that was",
        "compiled beforehand, `benchmarks/prepare_peers.py`), and the largest error against eager",
        "float32, relative to the largest output (for training, of all gradients).",
        "",
        _row(["workload", *head]),
        _row(["---"] * (len(head) + 1)),
    ]
    for name, own in rows.items():
        lines.append(_row([name, *(_compile_cell(own.get(s)) for s in systems)]))
    return [*lines, ""]


def time_cell(row: dict[str, Any] | None) -> str:
    """Milliseconds, or that a system was not ready in time; nothing where it was not measured."""
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return f"not ready in {row['compile_seconds']:.0f} s"
    return f"{row['milliseconds']:.3f}"


def ratio_of(own: dict[str, dict[str, Any]]) -> float | None:
    """How many times faster than the best peer accel is; None where one of both is missing."""
    times = {s: row["milliseconds"] for s, row in own.items() if row["milliseconds"] is not None}
    mine = times.pop("accel", None)
    return min(times.values()) / mine if mine and times else None


def _row_of_mean(found: dict[str, float], systems: int) -> list[str]:
    empty, worst = [""] * systems, min(found, key=lambda name: found[name])
    return [
        _row(["geometric mean", *empty, f"{geometric_mean(list(found.values())):.2f}"]),
        _row([f"worst: {worst}", *empty, f"{found[worst]:.2f}"]),
    ]


def _compile_cell(row: dict[str, Any] | None) -> str:
    """Seconds of compiling, where it began from nothing, and the error."""
    if row is None or row["error"] is None:
        return ""
    parts = [f"{row['error']:.0e}"]
    if row["compile_seconds"] is not None:
        parts.insert(0, f"{row['compile_seconds']:.1f} s")
    return ", ".join(parts)


def readme_lines(*results: dict[str, Any]) -> list[str]:
    """One line a workload: accel, the best peer of its run, the ratio."""
    lines = ["| GPU, 16 bits | accel ms | best peer | its ms | ratio |", "|---|---:|---|---:|---:|"]
    for data in results:
        rows: dict[str, dict[str, float]] = {}
        for row in data["rows"]:
            if row["milliseconds"] is not None:
                rows.setdefault(row["workload"], {})[row["system"]] = row["milliseconds"]
        for name, times in rows.items():
            own = times.pop("accel", None)
            if own is None or not times or name not in TITLES:
                continue
            best = min(times, key=lambda system: times[system])
            lines.append(
                f"| {TITLES[name]} | {own:.2f} | {_SYSTEMS[best]} | {times[best]:.2f} "
                f"| {times[best] / own:.2f} |"
            )
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
