"""The section of docs/benchmarks.md on generation, from benchmarks/results/gpu_decode.json."""

from __future__ import annotations

from typing import Any

from benchmarks.docs_gpu import mean_and_worst, ratio_of, time_cell

NEW = 256  # tokens of a text
_TITLES = {
    "transformers": "transformers",
    "transformers-compile": "transformers, compiled",
    "inductor": "Inductor",
    "inductor-reduce-overhead": "reduce-overhead",
    "inductor-max-autotune": "max-autotune",
    "accel": "accel",
}


def decode_lines(data: dict[str, Any]) -> list[str]:
    """Milliseconds of each system and the ratio to the best peer; then ready time and error."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in data["rows"]:
        rows.setdefault(row["workload"], {})[row["system"]] = row
    systems = [s for s in _TITLES if any(s in r for r in rows.values())]
    head = [_TITLES[s] for s in systems]
    lines = [
        "## GPU, generation",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}, transformers "
        f"{data['machine']['packages']['transformers']}. Shapes of Llama-3.2-1B and Llama-3-8B in",
        "bfloat16, random weights; a step after 1024 tokens (32k: after 32768), a prompt of 2048,",
        "a text of 128 + 256 tokens. Inductor compiles a model written for it, with merged",
        "projections and static caches; accel the plain model of transformers. Steps and prompts",
        "of transformers are eager, with its static cache; texts are its `generate`, eager with",
        "its dynamic cache, and compiled by torch.compile with its static cache.",
        "",
        "Milliseconds (medians; CUDA graphs allowed to all), and how many times faster accel is",
        "than the best peer. Mean and worst are of steps and prompts.",
        "",
        _line(["workload", *head, "ratio"]),
        _line(["---"] * (len(head) + 2)),
    ]
    for name, own in rows.items():
        ratio = ratio_of(own)
        cells = [time_cell(own.get(s)) for s in systems]
        lines.append(_line([name, *cells, f"{ratio:.2f}" if ratio else ""]))
    found = {name: r for name, own in rows.items() if (r := ratio_of(own)) and "_text" not in name}
    lines += [_line(cells) for cells in mean_and_worst(found, len(systems))]
    texts = [own["accel"] for own in rows.values() if own.get("accel", {}).get("step_milliseconds")]
    if texts:
        lines += ["", "Of accel's texts, with their prompts and what the host does in between:", ""]
        lines += [f"- {row['workload']}: {text_line(row)}" for row in texts]
    lines += [
        "",
        "Seconds until a system is ready (compiled, warm; none for Inductor's modes that found",
        "another one's kernels, or were compiled beforehand), and the largest error of the logits",
        "against eager float32, relative to the largest one. From the cache: a new process that",
        "finds accel's kernels there, weights already on the GPU.",
        "",
        _line(["workload", *head]),
        _line(["---"] * (len(head) + 1)),
    ]
    for name, own in rows.items():
        lines.append(_line([name, *(_ready(own[s]) if s in own else "" for s in systems)]))
    return [*lines, ""]


def text_line(row: dict[str, Any]) -> str:
    """Tokens a second of a text from beginning to end, beside what its steps alone would take."""
    step, prompt = row["step_milliseconds"], row["prompt_milliseconds"]
    steps = (NEW - 1) * step
    loop = (row["milliseconds"] - prompt - steps) / steps
    return (
        f"{1e3 * NEW / row['milliseconds']:.0f} tokens a second; one step by itself "
        f"{step:.3f} ms ({1e3 / step:.0f} a second), the prompt {prompt:.2f} ms, "
        f"the loop around them {100 * loop:.1f} % of the steps"
    )


def _ready(row: dict[str, Any]) -> str:
    if row["milliseconds"] is None:
        return ""
    seconds = "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f} s"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    again = row.get("from_cache_seconds")
    cached = f"from the cache {again:.1f} s" if again else ""
    return ", ".join(part for part in (seconds, cached, error) if part)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
