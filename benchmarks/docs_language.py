"""The sections on language models in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]


def equality_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """Which models' greedy texts are those of transformers."""
    rows = data["rows"]
    equal = sum(row["equal"] for row in rows.values())
    tokens = next(iter(rows.values()))["tokens"]
    lines = []
    for name, row in rows.items():
        difference = ""
        if not row["equal"]:
            difference = f"token {row['first_difference']}, gap {row['gap']:.1e}"
        text = "equal" if row["equal"] else "differs"
        kept = ", ".join(row["state"])
        lines.append([name, text, difference, str(row["different_tokens"]), kept])
    return [
        "## Greedy text beside `transformers.generate`",
        "",
        f"{equal} of {len(rows)} models: {tokens} new tokens, float32, each captured as a plain",
        "forward without a cache. Where texts differ: the first place, and how far apart the plain",
        "forward's two best logits are there. `different tokens`: of how many a text consists.",
        "",
        *markdown(["model", "text", "difference", "different tokens", "state"], lines),
        "",
    ]


SPEED_HEADS = ("tokens/s after 512", "after 4096")


def cells(row: dict[str, Any], full: dict[str, Any]) -> list[str]:
    """A row's figures as text, for this table and for docs/benchmarks.md."""
    change = row["perplexity"] / row.get("reference", full["perplexity"]) - 1
    rates = [row.get("speed", {}).get(context) for context in ("512", "4096")]
    return [
        str(row["bytes"]),
        f"{2 * row['bytes'] / full['bytes']:.3f}",
        "" if row["error"] is None else f"{row['error']:.1e}",
        f"{row['perplexity']:.3f}",
        f"{change:+.2%}",
        *(f"{r['tokens_per_second']:.1f} ({r['of_float32']:.2f})" if r else "" for r in rates),
    ]


def cache_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """Bytes, perplexity and speed of each kind of cache; texts longer than a cache."""
    rows = data["rows"]
    full = rows["float32"]
    lines = [
        [name, f"`{row['pipeline']}`" if row["pipeline"] else "", *cells(row, full)]
        for name, row in rows.items()
    ]
    head = ["cache", "passes", "bytes a token", "of 16 bits", "error of logits", "perplexity"]
    streamed = max((row.get("windows", 0) for row in rows.values()), default=0)
    return [
        "## Kinds of key/value cache, SmolLM2-135M",
        "",
        f"Perplexity on {data['windows']} windows of {data['window']} tokens of CPython's own",
        "`pydoc_data.topics`, as a change from float32; scales, zero points and sums are counted,",
        f"at {data['window']} tokens. Keys are rotated by a Hadamard matrix, except where",
        "the row says so. Kinds without an error of logits are measured token by token, on",
        f"{streamed} windows. Tokens a second: decoding after 512 tokens and after 4096, float32",
        "weights; and how many times as fast that is as with the float32 cache, in turns with it.",
        "",
        *markdown([*head, "change", *SPEED_HEADS], lines),
        "",
        *_long_lines(data, markdown),
    ]


def _long_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """A text eight times as long as the cache."""
    rows = data.get("long", {})
    if "full" not in rows:
        return []
    titles = {"full": "all tokens", "window": "the last 1024", "sinks": "4 sinks and the last 1020"}
    lines = [
        [
            titles[name],
            f"`{row['pipeline']}`" if row["pipeline"] else "",
            f"{row['bytes'] / 2**20:.1f} MiB",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / rows['full']['perplexity'] - 1:+.1%}",
            ", ".join(f"{p:.1f}" for p in row["eighths"]),
        ]
        for name, row in rows.items()
    ]
    head = ["tokens kept", "passes", "state", "perplexity", "change", "by eighths of the text"]
    return [
        "8192 tokens in a row, one after the other. The same tokens in windows, each read from its",
        f"own beginning, are the row float32 above: {data['rows']['float32']['perplexity']:.2f}.",
        "",
        *markdown(head, lines),
        "",
    ]


def gqa_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """Fewer key/value heads: error before and after healing."""
    trained = f"{data['full_heads']}, as trained"
    lines = [[trained, "", "1.000", "", f"{data['perplexity']:.3f}", ""]]
    for row in data["rows"]:
        how = f"{row['method']}, {row['clustered']} of {row['attentions']} clustered"
        lines.append(
            [
                str(row["heads"]),
                how if row["method"] == "best" else row["method"],
                f"{row['cache_share']:.3f}",
                f"{row['error']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{row['healed_perplexity']:.3f}",
            ]
        )
    head = ["key/value heads", "method", "KV bytes", "error of logits", "perplexity", "healed"]
    return [
        "## Fewer key/value heads",
        "",
        f"A model over bytes, trained for {data['train_steps']} steps on CPython's own",
        "`pydoc_data.topics`, converted by `convert_gqa`, then distilled from the original for",
        f"{data['heal_steps']} steps. Perplexity a byte, on text that no training saw.",
        "",
        *markdown(head, lines),
        "",
    ]
