"""The section of docs/benchmarks.md on generation beside transformers, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]

_TITLES = {
    "accel": "accel",
    "dynamic": "transformers, dynamic cache",
    "static": "transformers, static cache",
    "static-compile": "transformers, static cache, torch.compile",
}


def text_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """Tokens a second and prefill of each system, the memory's limit, prompt lookup."""
    systems = data["systems"]
    peers = [s for n, s in systems.items() if n != "accel"]
    own = systems["accel"]
    lines = [
        [
            _TITLES[name],
            f"{1 / s['token_seconds']:.1f}",
            f"{s['limit_share']:.2f}",
            f"{s['prefill_seconds']:.3f}",
        ]
        for name, s in systems.items()
    ]
    late = data.get("not_ready_in_seconds", {})
    lines += [[_TITLES[n], f"not compiled in {s:.0f} s", "", ""] for n, s in late.items()]
    decode = min(p["token_seconds"] for p in peers) / own["token_seconds"]
    prefill = min(p["prefill_seconds"] for p in peers) / own["prefill_seconds"]
    rates = [data["weight_bytes"] / s["limit_seconds"] / 1e9 for s in systems.values()]
    shares = own["limit_shares"]
    lookup = data["lookup"]
    counts, seconds = lookup["statistics"], lookup["seconds"]
    head = ["", "tokens a second", "of the memory's limit", f"prefill of {data['long_prompt']} s"]
    return [
        "## Generation beside `transformers.generate`, SmolLM2-135M, float32, CPU",
        "",
        f"{data['machine']['processor']}, {data['machine']['threads']} threads; torch "
        f"{data['machine']['packages']['torch']}, transformers "
        f"{data['machine']['packages']['transformers']}. One process, systems in turns "
        "(`benchmarks/generation.py`).",
        "",
        f"All systems write the same {data['identical_tokens']} greedy tokens. Tokens a second",
        f"after a prompt of {data['prompt']}. The limit: as many bytes as the weights have, read",
        "by as many threads from pages as large, just before and just after each text "
        f"({min(rates):.1f} to {max(rates):.1f} GB/s);",
        f"the median of {len(shares)} rounds (accel's lie between {min(shares):.2f} and "
        f"{max(shares):.2f}). What of the",
        "weights is still in the caches when the next token comes is not read from memory.",
        "",
        *markdown(head, lines),
        "",
        f"Against the best cache of transformers: decoding {decode:.2f}x, prefill {prefill:.2f}x.",
        "",
        f"Prompt lookup on a text that is copied from its prompt: {lookup['speedup']:.2f}x, the",
        f"same {lookup['new']} tokens, prompt of {lookup['prompt']} included "
        f"({seconds['plain']:.2f} s and {seconds['lookup']:.2f} s); {counts['accepted']} of "
        f"{counts['proposed']} proposed tokens were accepted, in {counts['rounds']} calls.",
        "",
    ]
