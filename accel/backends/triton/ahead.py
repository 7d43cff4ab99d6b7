"""Which lines of a product's epilogue can come before its multiplications, which hide their time.

What depends on a tile's rows alone (a number that scales a row, and how it is made of sums), or on
its columns (a bias), does not wait for the product; it costs registers while that is computed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ROOTS = ("row", "col", "row_of_parts")  # names of positions
_ROWS = {"row", "row_of_parts"}
_ASSIGNMENT = re.compile(r"(\w+) = (.*)")
_NAME = re.compile(r"[A-Za-z_]\w*")


def loaded_ahead(
    lines: Sequence[str],
    roots: Sequence[str] = ROOTS,
    *,
    columns: bool = True,
    product: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Loads that depend on rows alone, or on columns (unless not `columns`), what is computed of
    those of rows, and the positions that they need; and the lines without these.

    `lines` assign names once, positions perhaps again; `roots` are names of positions of rows and
    of columns. Names that are assigned neither in `lines` nor in those of the `product`, which are
    between, are known ahead.
    """
    assigned = {found[1] for found in map(_ASSIGNMENT.match, lines) if found is not None}
    for line in product:
        assigned |= set(_NAME.findall(line.partition(" = ")[0]))
    along: dict[str, set[str]] = {}  # positions: which of the roots they depend on
    made: dict[str, set[str]] = {}  # the same of what has been loaded
    ahead: list[tuple[str, str, bool]] = []
    rest: list[str] = []
    for line in lines:
        found = _ASSIGNMENT.match(line)
        name, text = (found[1], found[2]) if found is not None else ("", "")
        used = [n for n in _NAME.findall(text) if n in along or n in assigned]
        known = bool(used) and all(n in along for n in used)
        depends = set().union(*(along.get(n, made.get(n, set())) for n in used))
        rows = depends <= _ROWS
        if name in roots or (known and "tl.load(" not in text):
            along[name] = depends | ({name} & set(roots))
            ahead.append((name, line, False))
            rest.append(line)
        elif (known and (rows or (columns and len(depends) < 2))) or (
            used and rows and all(n in along or n in made for n in used)
        ):
            made[name] = depends
            ahead.append((name, line, True))
        else:
            rest.append(line)
    wanted: set[str] = set()
    kept: list[str] = []
    for name, line, moved in reversed(ahead):
        if moved or name in wanted:
            kept.append(line)
            wanted |= set(_NAME.findall(line))
    return kept[::-1], rest
