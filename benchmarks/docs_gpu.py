"""The GPU's sections of docs/benchmarks.md: whole models and their rooflines, from gpu.json and
gpu_roofline.json in benchmarks/results/; and the GPU's table of the README."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import geometric_mean

TITLES = {
    "bert_b1": "BERT-base, 128 tokens, B1",
    "bert_b32": "BERT-base, 128 tokens, B32",
    "vit_b1": "ViT-B/16 B1, all tokens",
    "vit_b64": "ViT-B/16 B64, all tokens",
    "vit_classifier_b1": "ViT-B/16 B1, classes",
    "vit_classifier_b64": "ViT-B/16 B64, classes",
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
    lines += [_row(cells) for cells in mean_and_worst(found, len(systems))]
    lines += [
        "",
        "Seconds from the model to the third call with nothing cached (none for Inductor's modes",
        "that found another one's kernels, or were compiled beforehand), and the largest error",
        "against eager float32, relative to the largest output (for training, of all gradients).",
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


def mean_and_worst(found: dict[str, float], empty: int) -> list[list[str]]:
    """The last two rows of a table of ratios, whose cells in between are empty."""
    if not found:
        return []
    between, worst = [""] * empty, min(found, key=lambda name: found[name])
    return [
        ["geometric mean", *between, f"{geometric_mean(list(found.values())):.2f}"],
        [f"worst: {worst}", *between, f"{found[worst]:.2f}"],
    ]


def _compile_cell(row: dict[str, Any] | None) -> str:
    """Seconds of compiling, where it began from nothing, and the error."""
    if row is None or row["error"] is None:
        return ""
    parts = [f"{row['error']:.0e}"]
    if row["compile_seconds"] is not None:
        parts.insert(0, f"{row['compile_seconds']:.1f} s")
    return ", ".join(parts)


def roofline_lines(data: dict[str, Any]) -> list[str]:
    """Floors of whole programs, and the kernels furthest from theirs."""
    rates = ", ".join(f"{n} {rate / 1e12:.0f}" for n, rate in data["peak_flops"].items())
    lines = [
        "## GPU, rooflines",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}. Measured there:",
        f"long reads at {data['bandwidth'] / 1e12:.2f} TB/s, large products at {rates} TFLOP/s.",
        "",
        "A kernel's floor is the longer of its bytes at the bandwidth of the reads and its",
        "operations at the rate of the products; bytes count though they may still lie in the L2",
        "cache. The kernels of a call run one by one, timed by CUPTI; a call is a CUDA graph, in",
        "which kernels overlap. Share: of the ceilings, floor by call. Furthest: the kernels that",
        "lose the most, equal ones together: what they take, and their floors. A training call",
        "has AdamW too, which is PyTorch's and not among the kernels.",
        "",
        _row(["workload", "floor us", "kernels us", "call us", "share", "launches", "furthest"]),
        _row(["---", *["---:"] * 5, "---"]),
    ]
    for row in data["rows"]:
        times = [f"{row[k]:.0f}" for k in ("floor_us", "steps_us", "call_us")]
        far = "; ".join(_far(kernel) for kernel in row["furthest"])
        share, launches = f"{row['share']:.2f}", str(row["launches"])
        lines.append(_row([row["workload"], *times, share, launches, far]))
    return [*lines, ""]


def _far(kernel: dict[str, Any]) -> str:
    ops = kernel["what"].split(", ")
    what = ", ".join([*ops[:3], "..."] if len(ops) > 3 else ops)
    count = f" x{kernel['calls']}" if kernel["calls"] > 1 else ""
    return f"{what}{count}: {kernel['time_us']:.0f}, {kernel['floor_us']:.0f}"


def readme_lines(*results: dict[str, Any]) -> list[str]:
    """One line a workload: accel, the best peer of its run, the ratio; the mean and the worst."""
    lines = ["| GPU, 16 bits | accel ms | best peer | its ms | ratio |", "|---|---:|---|---:|---:|"]
    found: dict[str, float] = {}
    for data in results:
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for row in data["rows"]:
            rows.setdefault(row["workload"], {})[row["system"]] = row
        for name, own in rows.items():
            ratio = ratio_of(own)
            if ratio is None or name not in TITLES:
                continue
            mine = own.pop("accel")["milliseconds"]
            times = {s: r["milliseconds"] for s, r in own.items() if r["milliseconds"] is not None}
            best = min(times, key=lambda system: times[system])
            found[TITLES[name]] = ratio
            cells = [TITLES[name], f"{mine:.2f}", _SYSTEMS[best], f"{times[best]:.2f}"]
            lines.append(_row([*cells, f"{ratio:.2f}"]))
    return lines + [_row(cells) for cells in mean_and_worst(found, 3)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
