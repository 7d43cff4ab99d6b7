"""A reduction of few rows, each of them long, in two launches.

One program a row would leave most of the GPU idle. So `SPLIT` programs share each row: the first
launch leaves a partial result of each in scratch memory, `[rows, SPLIT]`; the second combines a
row's partial results and computes what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from accel.backends.loops.merge import group_extent
from accel.backends.loops.phases import Phase, Reduce
from accel.backends.triton import dtypes
from accel.backends.triton.emitter import Emitter
from accel.backends.triton.program import Program, ProgramWriter
from accel.backends.triton.reductions import HELPERS, Reduction, Tile
from accel.backends.triton.text import COL, ROW
from accel.backends.triton.tiles import Columns, choose_rows, next_power, parts_of
from accel.ir.types import Dim, product

_LEAST_BLOCKS = 4  # of a row: fewer are not worth a second launch
_MOST_PARTS = 512
_LARGE = 1 << 22  # elements: so many are worth several programs for each multiprocessor
_WAVES = 4


@dataclass(frozen=True)
class Split:
    """`parts` programs a row, each with `chunk` columns."""

    parts: int
    chunk: int
    rows: int  # how many rows there are


def plan_split(phase: Phase, writer: ProgramWriter, sms: int) -> Split | None:
    """How to share each row's reductions; None if one launch is better."""
    reduces = phase.reduces
    simple = all(r.level == 0 for r in reduces) and not any(s.inner for s in phase.stores)
    if not reduces or not simple or len({frozenset(r.axes) for r in reduces}) != 1:
        return None
    groups = writer._merged(phase.outer)
    key = frozenset(reduces[0].axes)
    columns = {key: Columns(reduces[0].axes, writer._merged(reduces[0].axes))}
    rows, extent = product(group_extent(g) for g in groups), columns[key].extent
    if not isinstance(rows, int) or not isinstance(extent, int) or not rows:
        return None
    shape = choose_rows(groups, columns, writer.survey.reads, sms, writer.kernel_tile)
    programs = parts_of(rows, shape.rows)
    assert isinstance(programs, int)
    blocks = -(-extent // columns[key].size)
    large = rows * extent >= _LARGE
    if columns[key].held or programs * 2 > (_WAVES if large else 1) * sms:
        return None
    if blocks < _LEAST_BLOCKS:
        return None
    full = (_WAVES if large else 2) * sms
    wanted = min(next_power(full // programs), next_power(blocks) // 2, _MOST_PARTS)
    share = -(-blocks // wanted)
    return Split(wanted, share * columns[key].size, rows)


def partial_kinds(phase: Phase) -> list[str]:
    """Element types of the scratch buffers between the launches, in order."""
    tile = Tile("", 0, False)
    return [kind for reduce in phase.reduces for kind in Reduction(reduce, tile).kinds]


class PartialWriter(ProgramWriter):
    """The first launch. `targets` are the scratch buffers, one for each of `partial_kinds`."""

    def __init__(
        self, phase: Phase, emitter: Emitter, targets: Sequence[str], sms: int, split: Split
    ) -> None:
        super().__init__(replace(phase, stores=[]), emitter, targets, sms)
        self.split = split
        self.free = list(targets)
        self.program = "(tl.program_id(0) // SPLIT)"

    def write(self) -> Program:
        self.constants |= {"SPLIT": self.split.parts, "CHUNK": self.split.chunk}
        self._let("part", self._wide("(tl.program_id(0) % SPLIT)"))
        program = super().write()
        programs: Dim = product((program.programs, self.split.parts))
        return replace(program, programs=programs)

    def _bounds(self, columns: Columns) -> str:
        return f"part * CHUNK, tl.minimum(part * CHUNK + CHUNK, {columns.extent})"

    def _finish(self, reduce: Reduce, reduction: Reduction) -> None:
        block = self.emitter.block
        place = "row * SPLIT + part" if self.phase.outer else "part"
        mask = self.emitter.mask(frozenset(self.phase.outer))
        for value in reduction.partial(block):
            tail = f", mask={mask}" if mask else ""
            block.line(f"tl.store({self.free.pop(0)} + {place}, {value}{tail})")
        self.helpers |= reduction.helpers


class TotalWriter(ProgramWriter):
    """The second launch. `sources` are the scratch buffers."""

    def __init__(
        self,
        phase: Phase,
        emitter: Emitter,
        targets: Sequence[str],
        sms: int,
        split: Split,
        sources: Sequence[str],
    ) -> None:
        super().__init__(replace(phase, reduces=[]), emitter, targets, sms)
        self.reduces, self.split, self.sources = phase.reduces, split, list(sources)

    def write(self) -> Program:
        rows = max(1, min(1024 // self.split.parts, next_power(self.split.rows // self.sms)))
        self.constants["SPLIT"] = self.split.parts
        self._bind_rows(self._merged(self.phase.outer), rows)
        block = self.emitter.block
        tile = Tile("[ROWS, SPLIT]" if rows > 1 else "[SPLIT]", 1 if rows > 1 else 0, rows > 1)
        block.line(f"part = tl.arange(0, SPLIT){'[None, :]' if rows > 1 else ''}")
        place = "row * SPLIT + part" if self.phase.outer else "part"
        mask = self.emitter.mask(frozenset(self.phase.outer))
        dims = frozenset((ROW, COL)) if rows > 1 else frozenset((COL,))
        for reduce in self.reduces:
            reduction = Reduction(reduce, tile)
            for kind in reduction.kinds:
                tail = f", mask={mask}" if mask else ""
                text = f"tl.load({self.sources.pop(0)} + {place}{tail})"
                reduction.totals.append(block.let(text, kind, dims, "part"))
            self._finish(reduce, reduction)
        self._store_all()
        return Program(
            self.top.block.source(),
            [HELPERS[name] for name in sorted(self.helpers)],
            self.constants,
            parts_of(self.split.rows, rows),
            max(1, min(4, rows * self.split.parts // 256)),
            list(self.emitter.used),
            self.emitter.checks,
        )


def scratch_bytes(kind: str, split: Split) -> int:
    return split.rows * split.parts * dtypes.width(kind)
