"""How commands speak: tables for people, JSON for programs, errors for both.

Results go to stdout; progress and errors to stderr, progress only on a terminal. With `--json`
stdout holds one JSON value, an error included: `{"error": {"id": ..., "what": ...}}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from accel.errors import AccelError

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Width of tables that go to a file or a pipe, where no terminal says.
_PLAIN_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def emit(data: Any, as_json: bool, *parts: RenderableType) -> None:
    """Prints `data` as JSON, or the parts for a person."""
    if as_json:
        print(json.dumps(data, indent=2))
        return
    out = console()
    for part in parts:
        out.print(part)


def emit_text(text: str) -> None:
    """Prints text as it is: IR, source, pipelines."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; columns whose name starts with ">" are aligned to the right."""
    result = Table(title=title or None, title_justify="left", show_lines=False)
    for name in columns:
        right = name.startswith(">")
        result.add_column(name.removeprefix(">"), justify="right" if right else "left")
    for row in rows:
        result.add_row(*("" if cell is None else str(cell) for cell in row))
    return result


def facts(rows: Iterable[tuple[str, Any]]) -> Table:
    """Names and values, one a line."""
    result = Table.grid(padding=(0, 2))
    result.add_column(style="bold")
    result.add_column()
    for name, value in rows:
        result.add_row(name, str(value))
    return result


@contextmanager
def progress(label: str, as_json: bool = False) -> Iterator[None]:
    """A spinner on stderr while the body runs, if stderr is a terminal."""
    if as_json or not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(label):
        yield


def tell(line: str, as_json: bool = False) -> None:
    """One line of progress on stderr, if stderr is a terminal."""
    if not as_json and sys.stderr.isatty():
        console(stderr=True).print(line, style="dim", markup=False)


def fail(error: AccelError, as_json: bool) -> int:
    """Prints an error as one block and returns its exit code."""
    if as_json:
        print(json.dumps({"error": {**error.to_json(), "exit_code": error.exit_code}}, indent=2))
    else:
        console(stderr=True).print(f"error {error}", markup=False, style="red", soft_wrap=True)
    return error.exit_code


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"
