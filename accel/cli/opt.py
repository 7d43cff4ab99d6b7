"""`accel opt`: IR text in, a pipeline of passes, IR text out, as mlir-opt does.

The text holds no weights. Passes that read them need `--weights` (a safetensors file whose names
are those of the `accel.constant` ops), or `--random-weights` to try a pipeline on the structure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file

from accel.cli.output import Json, console, emit, emit_text
from accel.passes.registry import load_passes
from accel.errors import InputError, OptionError
from accel.ir import Module, TensorType, parse_module, print_module
from accel.ir.types import SUB_BYTE_BITS
from accel.passes.base import Context
from accel.passes.manager import PassManager

app = typer.Typer()


@app.command()
def opt(
    file: Annotated[str, typer.Argument(help='A file of IR text; "-" is stdin.')] = "-",
    passes: Annotated[str, typer.Option("--passes", "-p", help='"canonicalize,cse".')] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: stdout.")] = None,
    verify_only: Annotated[bool, typer.Option(help="Parse and verify; print nothing.")] = False,
    locations: Annotated[bool, typer.Option(help="Print source locations.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of the weights.")] = None,
    random_weights: Annotated[bool, typer.Option(help="Make up the weights.")] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and of checks.")] = 0,
    validate: Annotated[bool, typer.Option(help="Check every pass's contract.")] = False,
    fuel: Annotated[int, typer.Option(help="How many rewrites may happen; -1: all.")] = -1,
    print_after: Annotated[str, typer.Option(help='Print after this pass, or "all".')] = "",
    stop_after: Annotated[str, typer.Option(help="Stop after this pass.")] = "",
    dump_dir: Annotated[str, typer.Option(help="Folder for numbered dumps.")] = "",
    stats: Annotated[bool, typer.Option(help="Print what each pass did, on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Run passes over IR text.

    Exit codes: 2 for a bad pipeline, 4 for text or programs that break a rule, 5 for a broken
    contract.
    """
    load_passes()
    module = parse_module(*_read(file))
    if random_weights:
        _make_up_weights(module, seed)
    if weights is not None:
        _load_weights(module, weights)
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


def _read(file: str) -> tuple[str, str]:
    """The text and the name that errors use for it."""
    if file == "-":
        return sys.stdin.read(), "<stdin>"
    try:
        return Path(file).read_text(encoding="utf-8"), file
    except OSError as error:
        raise OptionError(f"cannot read '{file}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"'{file}' is not UTF-8 text") from error


def _constants(module: Module) -> dict[str, TensorType]:
    """Names and types of the weights that the program refers to."""
    ops = (op for op in module.walk() if op.name == "constant")
    return {str(op.attribute("name")): op.result.type for op in ops}


def _make_up_weights(module: Module, seed: int) -> None:
    """Random weights: normal floats, and small integers."""
    generator = torch.Generator().manual_seed(seed)
    for name, type in _constants(module).items():
        shape = tuple(int(d) for d in type.shape)
        if type.dtype in SUB_BYTE_BITS:
            low = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
            module.weights.add_sub_byte(name, low, type.dtype)
        elif type.dtype.is_floating_point or type.dtype.is_complex:
            module.weights.add(name, torch.randn(shape, generator=generator).to(type.dtype))
        else:
            integers = torch.randint(0, 2, shape, generator=generator)
            module.weights.add(name, integers.to(type.dtype))


def _load_weights(module: Module, path: Path) -> None:
    """The weights from a file. Raises InputError if one is missing or has another type."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"cannot read '{path}': {error}") from error
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
