"""Dependent launches: a kernel starts while the one before it still runs.

From Hopper on, a kernel may be launched before its predecessor has ended (programmatic dependent
launch). It says so with two instructions, which every launch of this generator has:

- `gdc_launch_dependents()`, at once: the next kernel's programs may come in as soon as all of this
  kernel's have;
- `gdc_wait()`: all earlier kernels have ended, and what they wrote can be read. Nothing that an
  earlier kernel may write is read before it, and nothing is written; each program executes it, also
  one with nothing to do, since the end of a kernel is what the next one's wait relies on.

What comes before the wait costs no time of its own: addresses, and loads of constants (weights),
which no kernel writes. `overlapped` moves these to the front of a source, and knows nothing about
what the source computes: only assignments before the first loop, store or branch are moved, and
only loads from parameters that are named as constants. The rest follows the wait, in order. So a
program has its first weights on their way while the last kernel's results are still being added.
"""

from __future__ import annotations

import ast
from collections.abc import Set

LAUNCH, WAIT = "gdc_launch_dependents", "gdc_wait"
WAIT_AFTER = "# after reads of "  # behind a wait that a writer places itself: pointers, by commas
_IMPORT = "from triton.language.extra.cuda import libdevice"
_WITH_WAITS = f"from triton.language.extra.cuda import {LAUNCH}, {WAIT}, libdevice"
FIRST_CAPABILITY = 90


def overlapped(source: str, name: str, constants: Set[str]) -> str:
    """A launch's source with both instructions.

    Args:
        source: a module with the Triton function `name`.
        constants: its pointer parameters that no kernel ever writes through.

    A source that has the wait already keeps its order. If it says (`WAIT_AFTER`) that it reads
    before what is not constant here, it waits at once as well.
    """
    tree = ast.parse(source)
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    lines = source.splitlines()
    head = "\n".join(lines[: function.body[0].lineno - 1]).replace(_IMPORT, _WITH_WAITS)
    body = lines[function.body[0].lineno - 1 : function.end_lineno]
    tail = lines[function.end_lineno or len(lines) :]
    if f"{WAIT}()" in source:
        early = [line.split(WAIT_AFTER)[1] for line in body if WAIT_AFTER in line]
        names = {name.strip() for part in early for name in part.split(",")}
        first = [f"    {LAUNCH}()"] + ([] if names <= constants else [f"    {WAIT}()"])
        return "\n".join([head, *first, *body, *tail]) + "\n"
    hoister = _Hoister(source, function, constants)
    early, late = hoister.split()
    made = [f"    {LAUNCH}()", *(f"    {t}" for t in early), f"    {WAIT}()"]
    made += [f"    {t}" for t in late]
    rest = lines[hoister.moved_to : function.end_lineno]
    return "\n".join([head, *made, *rest, *tail]) + "\n"


class _Hoister:
    """Splits the assignments at the start of a function into those before and after the wait."""

    def __init__(self, source: str, function: ast.FunctionDef, constants: Set[str]) -> None:
        self.source, self.function = source, function
        self.lines = source.splitlines()
        arguments = function.args.args
        self.ready = {a.arg for a in arguments if a.annotation is not None} | set(constants)
        self.parameters = {a.arg for a in arguments}
        self.touched: set[str] = set()  # names that a statement after the wait reads or writes
        self.count = 0
        self.moved_to = function.body[0].lineno - 1  # lines before this one are split

    def split(self) -> tuple[list[str], list[str]]:
        early: list[str] = []
        late: list[str] = []
        for statement in self.function.body:
            if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
                break
            target = statement.targets[0]
            self.moved_to = statement.end_lineno or statement.lineno
            if isinstance(target, ast.Name):
                self._place(target.id, statement.value, early, late)
                continue
            late.append(self._text(statement))
            self.ready -= _names(target)
            self.touched |= _names(statement)
        return early, late

    def _place(self, name: str, value: ast.expr, early: list[str], late: list[str]) -> None:
        free = name not in self.touched and name not in self.parameters
        is_load = _is_load(value)
        if free and self._is_ready(value) and (is_load or not _loads(value)):
            early.append(f"{name} = {self._text(value)}")
            if is_load:  # what is computed from it would wait for the memory
                self.ready.discard(name)
            else:
                self.ready.add(name)
            return
        text = self._text(value)
        for load in _loads(value):
            if self._is_ready(load):
                self.count += 1
                ahead = f"ahead_{self.count}"
                early.append(f"{ahead} = {self._text(load)}")
                text = text.replace(self._text(load), ahead)
        late.append(f"{name} = {text}")
        self.ready.discard(name)
        self.touched |= _names(value) | {name}

    def _is_ready(self, value: ast.expr) -> bool:
        """Whether it is known before the wait: addresses, and loads of constants at them."""
        own = {"tl", "float", "int", "min", "max"}
        if not _names(value) - own <= self.ready:
            return False
        calls = [n for n in ast.walk(value) if isinstance(n, ast.Call)]
        return all(_function(c) in _PURE for c in calls)

    def _text(self, node: ast.AST) -> str:
        if isinstance(node, ast.expr | ast.stmt) and node.lineno == node.end_lineno:
            line = self.lines[node.lineno - 1]
            if line.isascii():  # columns count bytes
                return line[node.col_offset : node.end_col_offset]
        return ast.get_source_segment(self.source, node) or ast.unparse(node)


_PURE = frozenset(
    ("tl.load", "tl.program_id", "tl.arange", "tl.minimum", "tl.maximum", "tl.full", "tl.where",
     "tl.zeros", "to")
)  # fmt: skip


def _function(call: ast.Call) -> str:
    """tl.load; "to" for the method of any value."""
    if isinstance(call.func, ast.Attribute):
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "tl":
            return f"tl.{call.func.attr}"
        return call.func.attr
    return ast.unparse(call.func)


def _is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _function(node) == "tl.load"


def _loads(value: ast.expr) -> list[ast.expr]:
    return [n for n in ast.walk(value) if isinstance(n, ast.expr) and _is_load(n)]


def _names(value: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
