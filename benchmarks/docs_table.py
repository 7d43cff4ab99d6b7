"""Generated documentation: docs/benchmarks.md, and the table of passes in README.md.

    python -m benchmarks.docs_table           # writes both; also: make docs
    python -m benchmarks.docs_table --check   # exit code 1 if one is out of date

The page comes from the JSON files in benchmarks/results/: a benchmark that has not run has no
section, and nothing on it is typed by hand. The table comes from the registered passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from accel.cli.passes import describe
from accel.passes.registry import load_passes
from benchmarks.docs_coverage import coverage_lines, op_db_lines
from benchmarks.docs_generation import text_lines
from benchmarks.docs_gpu import gpu_lines, readme_lines, roofline_lines
from benchmarks.docs_gpu_attention import attention_lines, cached_lines
from benchmarks.docs_gpu_decode import decode_lines
from benchmarks.docs_gpu_numerics import numerics_lines
from benchmarks.docs_gpu_products import product_lines
from benchmarks.docs_language import cache_lines, equality_lines, gqa_lines
from benchmarks.docs_speculation import speculation_lines
from benchmarks.measure import ROOT, TITLES, geometric_mean, load_results

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `python -m benchmarks.docs_table` from the files in `benchmarks/results/`; a test holds both
together. Ratios come from one run each: the systems of a row share a process and take turns, and
every output is checked against eager PyTorch in float64 before anything is timed. Absolute times
hold only for the machine named.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="docs/benchmarks.md from the results")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(arguments)
    files = {PAGE: render(), README: readme(README.read_text())}
    if options.check:
        sys.exit(int(any(not f.is_file() or f.read_text() != text for f, text in files.items())))
    for file, text in files.items():
        file.write_text(text)


def readme(text: str) -> str:
    """The README with its generated tables up to date."""
    on_gpu = readme_lines(load_results("gpu"), load_results("gpu_decode"))
    tables = (("passes", passes_table()), ("figures", figures_table()), ("GPU figures", on_gpu))
    for name, rows in tables:
        start, end = f"<!-- {name}: made by `make docs` -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = "".join([before, start, "\n", *(f"{row}\n" for row in rows), end, after])
    return text


def figures_table() -> list[str]:
    """Speed on the CPU beside each peer, one line a model."""
    rows = list(load_results("cpu")["rows"].values())
    peers = ["eager", "inductor", "onnxruntime"]
    head = ["CPU, float32", "accel ms", *(f"times {TITLES[p]}" for p in peers)]
    lines = []
    for row in rows:
        own = row["systems"]["accel"]["seconds"]
        ratios = [row["systems"][p]["seconds"] / own for p in peers]
        lines.append([row["title"], f"{own * 1e3:.1f}", *(f"{r:.2f}" for r in ratios)])
    return markdown(head, lines)


def passes_table() -> list[str]:
    own = (cls for cls in load_passes().values() if cls.__module__.startswith("accel."))
    rows = [describe(cls) for cls in own]
    lines = [
        "| pass | what it does | contract | options |",
        "|---|---|---|---|",
    ]
    for row in rows:
        what = " ".join(row["doc"].split("\n\n")[0].split())
        options = ", ".join(f"`{name}`" for name in row["options"])
        lines.append(f"| `{row['name']}` | {what} | {row['contract']} | {options} |")
    return lines


def render() -> str:
    """The whole page."""
    sections: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("cpu", cpu_section),
        ("gpu", gpu_section),
        ("gpu_roofline", roofline_section),
        ("gpu_products", products_section),
        ("gpu_attention", attention_section),
        ("gpu_cached", gpu_cached_section),
        ("gpu_decode", generation_section),
        ("gpu_numerics", numerics_section),
        ("compile_time", compile_time_section),
        ("memory", memory_section),
        ("compression", compression_section),
        ("coverage", coverage_section),
        ("op_db", op_db_section),
        ("compression_decode", decode_section),
        ("generation_equality", equality_section),
        ("speculation_statistics", speculation_section),
        ("kv_cache", cache_section),
        ("generation", text_section),
        ("gqa", gqa_section),
    )
    parts = [HEAD]
    for name, section in sections:
        data = load_results(name)
        if data:
            parts.append(section(data))
    return "\n".join(parts)


def equality_section(data: dict[str, Any]) -> str:
    return "\n".join(equality_lines(data, markdown))


def speculation_section(data: dict[str, Any]) -> str:
    return "\n".join(speculation_lines(data, markdown))


def numerics_section(data: dict[str, Any]) -> str:
    return "\n".join(numerics_lines(data, markdown))


def text_section(data: dict[str, Any]) -> str:
    return "\n".join(text_lines(data, markdown))


def cache_section(data: dict[str, Any]) -> str:
    return "\n".join(cache_lines(data, markdown))


def gqa_section(data: dict[str, Any]) -> str:
    return "\n".join(gqa_lines(data, markdown))


def gpu_section(data: dict[str, Any]) -> str:
    return "\n".join(gpu_lines(data))


def roofline_section(data: dict[str, Any]) -> str:
    return "\n".join(roofline_lines(data))


def attention_section(data: dict[str, Any]) -> str:
    return "\n".join(attention_lines(data))


def gpu_cached_section(data: dict[str, Any]) -> str:
    return "\n".join(cached_lines(data))


def generation_section(data: dict[str, Any]) -> str:
    return "\n".join(decode_lines(data))


def products_section(data: dict[str, Any]) -> str:
    return "\n".join(product_lines(data))


def cpu_section(data: dict[str, Any]) -> str:
    rows = list(data["rows"].values())
    names = [n for n in TITLES if any(n in row["systems"] for row in rows)]
    peers = [n for n in names if n != "accel"]
    return "\n".join(
        [
            "## CPU, float32, exact passes only",
            "",
            machine_line(data["machine"]),
            "",
            "Milliseconds of a call (medians), and how many times faster accel is than each peer.",
            "",
            *speed_table(rows, names, peers),
            "",
            "Seconds to compile with an empty cache, imports and one-time set-up excluded, and the",
            "second compile in a new process that finds the cache. (Frozen Inductor compiles after",
            "Inductor in the same process and finds some of its work done.)",
            "",
            *compile_table(rows, [n for n in peers if n != "eager"]),
            "",
            "Largest error against float64, relative to the largest value.",
            "",
            *error_table(rows, names),
            "",
        ]
    )


def speed_table(rows: list[dict[str, Any]], names: list[str], peers: list[str]) -> list[str]:
    head = ["", *(TITLES[n] + " ms" for n in names), *(f"/ {TITLES[n]}" for n in peers)]
    ratios: dict[str, list[float]] = {peer: [] for peer in peers}
    lines = []
    for row in rows:
        seconds = {n: f["seconds"] for n, f in row["systems"].items()}
        cells = [row["title"], *(f"{seconds[n] * 1e3:.2f}" if n in seconds else "" for n in names)]
        for peer in peers:
            if peer in seconds and "accel" in seconds:
                ratio = seconds[peer] / seconds["accel"]
                ratios[peer].append(ratio)
                cells.append(f"{ratio:.2f}")
            else:
                cells.append("")
        lines.append(cells)
    means = [f"**{geometric_mean(r):.2f}**" if r else "" for r in ratios.values()]
    lines.append(["**geometric mean**", *("" for _ in names), *means])
    torch_peers = [p for p in peers if p in ("eager", "inductor")]
    best = [
        min(row["systems"][p]["seconds"] for p in torch_peers) / row["systems"]["accel"]["seconds"]
        for row in rows
        if "accel" in row["systems"] and all(p in row["systems"] for p in torch_peers)
    ]
    table = markdown(head, lines)
    if best and torch_peers == ["eager", "inductor"]:
        table += ["", f"Against the better of eager and Inductor: {geometric_mean(best):.2f}x."]
    return table


def compile_table(rows: list[dict[str, Any]], peers: list[str]) -> list[str]:
    head = [
        "",
        "accel s",
        *(f"{TITLES[p]} s" for p in peers),
        *(f"accel / {TITLES[p]}" for p in peers),
    ]
    head += ["accel, from cache s"]
    lines = []
    for row in rows:
        systems = row["systems"]
        if "accel" not in systems:
            continue
        own = systems["accel"]["compile_seconds"]
        others = [systems.get(p, {}).get("compile_seconds") for p in peers]
        shares = [None if other is None else own / other for other in others]
        cached = systems["accel"].get("cached_compile_seconds")
        numbers = [own, *others, *shares, cached]
        lines.append([row["title"], *("" if n is None else f"{n:.2f}" for n in numbers)])
    return markdown(head, lines)


def error_table(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    lines = [
        [
            row["title"],
            *(f"{row['systems'][n]['error']:.1e}" if n in row["systems"] else "" for n in names),
            f"{row['allowed_error']:.1e}",
        ]
        for row in rows
    ]
    return markdown(["", *(TITLES[n] for n in names), "allowed"], lines)


def compile_time_section(data: dict[str, Any]) -> str:
    depths = sorted(data["rows"], key=int)
    rows = [data["rows"][d] for d in depths]
    inductor = any("inductor_compile_seconds" in r for r in rows)
    head = [
        "layers",
        "ops",
        "compile s",
        "ms per op",
        "verification",
        "kernels made",
        "from cache s",
    ]
    lines = []
    for depth, r in zip(depths, rows):
        cells = [
            depth,
            str(r["ops"]),
            f"{r['compile_seconds']:.2f}",
            f"{r['compile_seconds'] * 1e3 / r['ops']:.2f}",
            f"{r['verify_seconds'] / r['compile_seconds']:.1%}",
            str(r["kernels"]),
            f"{r['cached_compile_seconds']:.2f}",
        ]
        if inductor:
            cells.append(f"{r.get('inductor_compile_seconds', float('nan')):.2f}")
        lines.append(cells)
    growth = rows[-1]["compile_seconds"] / rows[0]["compile_seconds"]
    return "\n".join(
        [
            "## Compile time against depth",
            "",
            machine_line(data["machine"]),
            "",
            "Transformers of equal layers (`benchmarks/compile_time.py`), empty cache.",
            "",
            *markdown(head + (["Inductor s"] if inductor else []), lines),
            "",
            f"{depths[-1]} layers take {growth:.2f}x the time of {depths[0]}.",
            "",
        ]
    )


def memory_section(data: dict[str, Any]) -> str:
    head = [
        "artifact",
        "file",
        "weights",
        "arena",
        "load s",
        "first call s",
        "peak",
        "peak - weights - arena",
    ]
    lines = []
    for name, r in data["rows"].items():
        rest = r["peak_bytes"] - r["weight_bytes"] - r["arena_bytes"]
        sizes = [megabytes(r[k]) for k in ("file_bytes", "weight_bytes", "arena_bytes")]
        times = [f"{r['load_seconds']:.3f}", f"{r['first_call_seconds']:.3f}"]
        lines.append([name, *sizes, *times, megabytes(r["peak_bytes"]), megabytes(rest)])
    return "\n".join(
        [
            "## Loading an artifact",
            "",
            machine_line(data["machine"]),
            "",
            "A fresh process that never imports the compiler; memory beyond `import torch`.",
            "",
            *markdown(head, lines),
            "",
        ]
    )


def compression_section(data: dict[str, Any]) -> str:
    head = ["", "pipeline", "linears", "of fp32", "whole model", "weight error", "perplexity"]
    lines = [
        [
            name,
            f"`{r['pipeline']}`" if r["pipeline"] else "",
            megabytes(r["linear_bytes"]),
            f"{r['linear_bytes'] / r['linear_bytes_before']:.3f}",
            megabytes(r["model_bytes"]),
            f"{r['mean_weight_error']:.4f}",
            f"{r['perplexity']:.2f}",
        ]
        for name, r in data["rows"].items()
    ]
    return "\n".join(
        [
            "## Compression of SmolLM2-135M",
            "",
            machine_line(data["machine"]),
            "",
            "One pass each; bytes of the linears' weights with every part of their encoding, and",
            "perplexity on CPython's own documentation (`benchmarks/compression.py`).",
            "",
            *markdown(head, lines),
            "",
        ]
    )


def decode_section(data: dict[str, Any]) -> str:
    parts = data["seconds"]
    head = ["", *(x for part in parts for x in (f"{part}, ms", "times fp32"))]
    lines = []
    for name in next(iter(parts.values())):
        cells = [name]
        for seconds in parts.values():
            ratio = seconds["fp32"] / seconds[name]
            cells += [f"{seconds[name] * 1e3:.2f}", f"{ratio:.2f}"]
        lines.append(cells)
    return "\n".join(
        [
            "## Compressed weights, one row",
            "",
            machine_line(data["machine"]),
            "",
            "`linears`: the 210 linears of SmolLM2-135M on one row each; `token`: the whole model",
            "on one token; and how many times as fast that is as with float32 weights",
            "(`benchmarks/compression_decode.py`).",
            "",
            *markdown(head, lines),
            "",
        ]
    )


def coverage_section(data: dict[str, Any]) -> str:
    return "\n".join(
        [
            "## Architectures",
            "",
            machine_line(data["machine"]),
            "",
            "Tiny random models of `transformers` (`tests/zoo.py`) through `torch.compile`. One",
            "counts where it is a single graph and matches eager (1e-4 of the largest element;",
            "gradients 1e-3); with dynamic sizes, where one program serves three batches and",
            "lengths. Where Python loops over the tokens, Dynamo itself makes a graph a length.",
            "Seconds: the first call, without compile caches, on a machine with other work.",
            "",
            *coverage_lines(data["models"]),
            "",
        ]
    )


def op_db_section(data: dict[str, Any]) -> str:
    return "\n".join(
        [
            "## PyTorch's own operator samples",
            "",
            machine_line(data["machine"]),
            "",
            "`torch.testing`'s op_db through `accel.compile`, against eager",
            "(`benchmarks/op_db.py`): all samples of float32, the first of other dtypes.",
            "",
            *op_db_lines(data["dtypes"]),
            "",
        ]
    )


def megabytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def machine_line(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    system = f"{machine['processor']}, {machine['threads']} threads"
    return f"{system}; Python {machine['python']}, {packages}."


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    main()
