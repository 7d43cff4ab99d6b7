"""`accel bisect`: from "wrong output" to pass, rewrite, small program and a pytest file.

Give IR text, or a model with example inputs; the pipeline defaults to the compiler's exact passes.
Exit codes: 0 if every contract holds, 5 if one is broken (and the finding is printed).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from accel.cli.capture import capture_model
from accel.cli.opt import fill_or_read_weights, read_text
from accel.cli.output import Json, emit, progress, tell
from accel.cli.plugins import Load, load_all_passes
from accel.errors import ContractError
from accel.ir import Module, parse_module
from accel.passes.base import Context
from accel.passes.bisect import bisect as find_wrong_rewrite
from accel.passes.pipelines import EXACT_PIPELINE

app = typer.Typer()


@app.command()
def bisect(
    program: Annotated[str, typer.Argument(help="A file of IR text (.mlir), or a model.")],
    passes: Annotated[str, typer.Option("--passes", "-p", help="Default: the exact passes.")] = "",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="Of a model; see accel compile.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the pytest file here.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of the weights.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    load: Load = None,
    as_json: Json = False,
) -> None:
    """Find the rewrite that makes an output wrong."""
    load_all_passes(load)
    module = _module(program, inputs or [], weights, seed)
    pipeline: Any = passes or list(EXACT_PIPELINE)
    with progress("bisecting", as_json):
        finding = find_wrong_rewrite(
            module, pipeline, context=Context, seed=seed, log=lambda line: tell(line, as_json)
        )
    if finding is None:
        emit({"finding": None}, as_json, "every contract of the pipeline holds")
        return
    if output is not None:
        output.write_text(finding.test_source)
    parts = [finding.summary()]
    parts.append(f"pytest file: {output}" if output else finding.test_source)
    emit({"finding": finding.to_json()}, as_json, *parts)
    raise typer.Exit(ContractError.exit_code)


def _module(program: str, inputs: list[str], weights: Path | None, seed: int) -> Module:
    if program == "-" or program.endswith(".mlir"):
        module = parse_module(*read_text(program))
        fill_or_read_weights(module, weights, seed)
        return module
    return capture_model(program, inputs, seed)
