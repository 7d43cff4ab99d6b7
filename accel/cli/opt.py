"""`accel opt`: IR text in, a pipeline of passes, IR text out, as mlir-opt does.

The text holds no weights. Passes that read them need `--weights` (a safetensors file whose names
are those of the `accel.constant` ops), or `--random-weights` to try a pipeline on the structure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from accel.cli.inputs import load_tensors
from accel.cli.output import Json, console, emit, emit_text
from accel.cli.plugins import Load, load_all_passes
from accel.errors import InputError, OptionError
from accel.ir import Module, TensorType, parse_module, print_module
from accel.ir.types import SUB_BYTE_BITS
from accel.passes.base import Context
from accel.passes.bisect import fill_weights
from accel.passes.manager import PassManager

app = typer.Typer()


@app.command()
def opt(
    file: Annotated[str, typer.Argument(help='A file of IR text; "-" is stdin.')] = "-",
    passes: Annotated[str, typer.Option("--passes", "-p", help='"canonicalize,cse".')] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: stdout.")] = None,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Parse and verify; print nothing.")
    ] = False,
    locations: Annotated[bool, typer.Option("--locations", help="Print source locations.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of the weights.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Make up the weights.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and of checks.")] = 0,
    validate: Annotated[
        bool, typer.Option("--validate", help="Check every pass's contract.")
    ] = False,
    fuel: Annotated[int, typer.Option(help="How many rewrites may happen; -1: all.")] = -1,
    print_after: Annotated[str, typer.Option(help='Print after this pass, or "all".')] = "",
    stop_after: Annotated[str, typer.Option(help="Stop after this pass.")] = "",
    dump_dir: Annotated[str, typer.Option(help="Folder for numbered dumps.")] = "",
    stats: Annotated[
        bool, typer.Option("--stats", help="Print what each pass did, on stderr.")
    ] = False,
    load: Load = None,
    as_json: Json = False,
) -> None:
    """Run passes over IR text, as mlir-opt does."""
    load_all_passes(load)
    module = parse_module(*read_text(file))
    if random_weights or weights is not None:
        fill_or_read_weights(module, weights, seed)
    if verify_only:
        functions = {f.name: f.body.size for f in module.functions.values()}
        if as_json:
            emit({"valid": True, "functions": functions}, True)
        return
    manager = PassManager(
        passes,
        Context(fuel=None if fuel < 0 else fuel),
        validate=validate,
        seed=seed,
        dump_dir=dump_dir or None,
        print_after=print_after or (),
        stop_after=stop_after or None,
    )
    ledger = manager.run(module)
    text = print_module(module, locations=locations)
    if stats:
        console(stderr=True).print(ledger.table(), ledger.rules_table())
    if output is not None:
        output.write_text(text)
    if as_json:
        emit({"ir": text, "ledger": ledger.to_json()}, True)
    elif output is None:
        emit_text(text)


def read_text(file: str) -> tuple[str, str]:
    """The text and the name that errors use for it."""
    if file == "-":
        return sys.stdin.read(), "<stdin>"
    try:
        return Path(file).read_text(encoding="utf-8"), file
    except OSError as error:
        raise OptionError(f"cannot read '{file}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"'{file}' is not UTF-8 text") from error


def fill_or_read_weights(module: Module, path: Path | None, seed: int) -> None:
    """Gives the program weights: those of the file, or made up ones."""
    if path is None:
        fill_weights(module, seed, {})
    else:
        read_weights(module, path)


def _constants(module: Module) -> dict[str, TensorType]:
    """Names and types of the weights that the program refers to."""
    ops = (op for op in module.walk() if op.name == "constant")
    return {str(op.attribute("name")): op.result.type for op in ops}


def read_weights(module: Module, path: Path) -> None:
    """The weights from a file. Raises InputError if one is missing or has another type."""
    tensors = load_tensors(path)
    for name, type in _constants(module).items():
        found = tensors.get(name)
        if found is None:
            raise InputError(f"'{path}' has no tensor '{name}'", where=f"accel.constant {name}")
        if type.dtype in SUB_BYTE_BITS:
            module.weights.add_lazy(name, type, lambda t=found: t)  # type: ignore[misc]
        elif TensorType(tuple(found.shape), found.dtype) != type:
            got = TensorType(tuple(found.shape), found.dtype)
            raise InputError(f"tensor '{name}' is {got}, not {type}", where=str(path))
        else:
            module.weights.add(name, found)
