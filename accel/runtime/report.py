"""The ledger as text, for people who have the artifact and not the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("#", "pass", "contract", "rewrites", "ops", "weights", "error", "ms")


def explain(ledger: Mapping[str, Any]) -> str:
    """One line a pass: contract, rewrites, operations, bytes of weights, measured error, time."""
    rows = ledger.get("rows")
    if not isinstance(rows, list) or not rows:
        return "no passes are recorded"
    lines = [_COLUMNS, *(_line(row) for row in rows if isinstance(row, Mapping))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(_join(line, widths) for line in lines)


def _join(line: Sequence[str], widths: Sequence[int]) -> str:
    left = ("pass", "contract")
    cells = [
        text.ljust(width) if column in left else text.rjust(width)
        for column, text, width in zip(_COLUMNS, line, widths)
    ]
    return "  ".join(cells).rstrip()


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    rewrites = row.get("rewrites")
    count = sum(v for v in rewrites.values() if isinstance(v, int)) if rewrites else 0
    state = " (undone)" if row.get("undone") else "" if row.get("changed") else " (no change)"
    return (
        str(row.get("index", "")),
        f"{row.get('name', '?')}{state}",
        str(row.get("contract", "")),
        str(count or ""),
        _step(row.get("ops_before"), row.get("ops_after"), str),
        _step(_bytes_of(row, "before"), _bytes_of(row, "after"), format_bytes),
        _number(row.get("error"), "{:.2g}"),
        _number(row.get("seconds"), "{:.1f}", 1e3),
    )


def _bytes_of(row: Mapping[str, Any], side: str) -> Any:
    cost = row.get(side)
    return cost.get("weight_bytes") if isinstance(cost, Mapping) else None


def _number(value: Any, form: str, scale: float = 1.0) -> str:
    return form.format(value * scale) if isinstance(value, (int, float)) else ""


def _step(before: Any, after: Any, form: Any) -> str:
    if not isinstance(after, (int, float)):
        return ""
    return form(after) if before == after else f"{form(before)} -> {form(after)}"


def format_bytes(size: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
