"""The ledger: what every pass did. JSON-able, so that it travels in the artifact.

A row holds rewrites by rule; operations, traffic, weight bytes and the time that the roofline
predicts for the context's target, before and after (`accel.ir.cost`); the error that the contract
check measured; and seconds for the pass, its verification and its check.
`table()` and `waterfall()` render it for `accel explain`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from accel.errors import ArtifactError
from accel.ir.cost import Cost

_MOST_MISSES = 200


@dataclass
class PassRow:
    """One pass of a pipeline."""

    index: int
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    contract: str = "exact"
    changed: bool = False
    undone: bool = False
    rewrites: dict[str, int] = field(default_factory=dict)
    ops_before: int = 0
    ops_after: int = 0
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    error: float | None = None
    metric: str = ""
    measured_on: str = ""
    seconds: float = 0.0
    verify_seconds: float = 0.0
    check_seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def saved(self) -> Cost:
        """Operations and bytes that the pass took away (negative: it added some)."""
        return self.before - self.after

    @property
    def total_rewrites(self) -> int:
        return sum(self.rewrites.values())


@dataclass
class Miss:
    """A rule that nearly fired: at which op, and what stood in the way; `count` times."""

    pass_name: str
    rule: str
    op: str
    where: str
    reason: str
    count: int = 1


@dataclass
class Ledger:
    """Rows in the order of the passes, and near misses."""

    rows: list[PassRow] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    def add_miss(self, pass_name: str, rule: str, op: str, where: str, reason: str) -> None:
        """Counts a near miss; equal ones at other places are one entry."""
        for known in self.misses:
            if (known.pass_name, known.rule, known.op, known.reason) == (
                pass_name, rule, op, reason,
            ):  # fmt: skip
                known.count += 1
                return
        if len(self.misses) < _MOST_MISSES:
            self.misses.append(Miss(pass_name, rule, op, where, reason))

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.rows)

    @property
    def verify_seconds(self) -> float:
        return sum(r.verify_seconds for r in self.rows)

    def extend(self, other: Ledger) -> None:
        """Appends another pipeline's rows, numbered on."""
        first = len(self.rows)
        for row in other.rows:
            self.rows.append(dataclasses.replace(row, index=first + row.index))
        self.misses.extend(other.misses)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [dataclasses.asdict(r) for r in self.rows],
            "misses": [dataclasses.asdict(m) for m in self.misses],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Ledger:
        """Reads `to_json`'s form. Raises ArtifactError for anything else."""
        try:
            rows = [
                PassRow(**{**row, "before": Cost(**row["before"]), "after": Cost(**row["after"])})
                for row in data["rows"]
            ]
            return Ledger(rows, [Miss(**m) for m in data["misses"]])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the ledger is malformed: {error}") from error

    def table(self) -> Table:
        """One line a pass, for a terminal."""
        table = Table(title="passes")
        for name in ("#", "pass", "contract", "rewrites", "ops", "GFLOP", "traffic", "weights"):
            table.add_column(name, justify="left" if name in ("pass", "contract") else "right")
        table.add_column("error", justify="right")
        table.add_column("ms", justify="right")
        for r in self.rows:
            state = " (undone)" if r.undone else "" if r.changed else " (no change)"
            table.add_row(
                f"{r.index:02d}", r.name + state, r.contract, str(r.total_rewrites or ""),
                _step(r.ops_before, r.ops_after, str),
                _step(r.before.flops, r.after.flops, lambda n: f"{n / 1e9:.3g}"),
                _step(r.before.bytes, r.after.bytes, format_bytes),
                _step(r.before.weight_bytes, r.after.weight_bytes, format_bytes),
                "" if r.error is None else f"{r.error:.2g}",
                f"{r.seconds * 1e3:.1f}",
            )  # fmt: skip
        return table

    def rules_table(self) -> Table:
        """Rewrites by pass and rule."""
        table = Table("pass", "rule", title="rewrites")
        table.add_column("count", justify="right")
        for r in self.rows:
            for rule, count in sorted(r.rewrites.items(), key=lambda item: -item[1]):
                table.add_row(r.name, rule, str(count))
        return table

    def misses_table(self) -> Table:
        """What nearly happened, and why it did not."""
        table = Table("pass", "rule", "at", "what stood in the way", title="near misses")
        table.add_column("times", justify="right")
        for m in self.misses:
            place = f"accel.{m.op}" + (f"\n{m.where}" if m.where else "")
            table.add_row(m.pass_name, m.rule, place, m.reason, str(m.count))
        return table

    def waterfall(self, width: int = 40) -> Text:
        """Bytes moved after each pass that changed them, as bars from the start's to the end's."""
        text = Text()
        rows = [r for r in self.rows if r.before != r.after and not r.undone]
        top = max([1, *(max(r.before.bytes, r.after.bytes) for r in rows)])
        if rows:
            text.append(_bar("before", rows[0].before, 0, top, width), style="dim")
        for r in rows:
            change = r.after.bytes - r.before.bytes
            line = _bar(r.name, r.after, change, top, width)
            text.append(line, style="green" if change < 0 else "red" if change > 0 else "")
        return text


def _bar(name: str, cost: Cost, change: int, top: int, width: int) -> str:
    bar = "█" * max(1, round(width * cost.bytes / top))
    delta = f" ({'+' if change > 0 else '-'}{format_bytes(abs(change))})" if change else ""
    predicted = f", at least {cost.seconds * 1e3:.3g} ms" if cost.seconds else ""
    return (
        f"{name:<20.20} {bar:<{width}} {format_bytes(cost.bytes):>9} moved{delta}, "
        f"{format_bytes(cost.weight_bytes)} weights, {cost.flops / 1e9:.3g} GFLOP{predicted}\n"
    )


def _step(before: int, after: int, show: Any) -> str:
    return show(after) if before == after else f"{show(before)} → {show(after)}"


def format_bytes(n: int) -> str:
    """1536 -> 1.5 KiB."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
