"""The section on speculation's statistics in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Markdown = Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]


def speculation_lines(data: dict[str, Any], markdown: Markdown) -> list[str]:
    """What is drawn against the exact distribution."""
    lines = []
    for name, row in data["rows"].items():
        counts = [str(row[n]) for n in ("draws", "outcomes", "accepted")]
        figures = [f"{row['statistic']:.1f}", str(row["degrees"]), f"{row['p']:.3g}"]
        lines.append([name, *counts, *figures])
    head = ["draws of", "draws", "outcomes", "accepted", "chi-square", "degrees", "p"]
    return [
        "## Speculation: what is drawn against the exact distribution",
        "",
        "Chi-square tests. `p`: how probable counts at least that far off are if the distribution",
        "is the model's; under 0.01 would tell that it is not, as it does where every proposal is",
        "kept (planted). `accepted`: proposed tokens that were kept.",
        "",
        *markdown(head, lines),
        "",
    ]
