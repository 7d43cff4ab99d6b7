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


def cache_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """Bytes and perplexity of each kind of cache."""
    rows = data["rows"]
    full = rows["float32"]
    lines = []
    for name, row in rows.items():
        share, change = row["bytes"] / full["bytes"], row["perplexity"] / full["perplexity"] - 1
        lines.append(
            [
                name,
                f"`{row['pipeline']}`" if row["pipeline"] else "",
                str(row["bytes"]),
                f"{share:.3f}",
                f"{2 * share:.3f}",
                f"{row['error']:.1e}",
                f"{row['perplexity']:.3f}",
                f"{change:+.2%}",
            ]
        )
    head = ["cache", "passes", "bytes a token", "of float32", "of 16 bits"]
    head += ["error of logits", "perplexity", "change"]
    return [
        "## Kinds of key/value cache, SmolLM2-135M",
        "",
        f"Perplexity on {data['windows']} windows of {data['window']} tokens of CPython's own",
        "`pydoc_data.topics`; scales and zero points are counted. Queries and keys are rotated by",
        "a Hadamard matrix first, except where the row says so.",
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
