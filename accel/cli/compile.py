"""`accel compile`: a model into an artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
import typer

import accel
from accel.cli.calls import Dtype, Tune
from accel.cli.capture import Example, load_example
from accel.cli.explain import tuning_parts
from accel.cli.inputs import parse_dtype
from accel.cli.inspect import counts, describe
from accel.cli.models import load_model
from accel.cli.output import Json, emit, facts, format_bytes, format_seconds, progress
from accel.cli.plugins import Load, load_all_passes
from accel.errors import OptionError
from accel.frontends.checkpoints import has_tokenizer, load_tokenizer
from accel.passes.ledger import Ledger
from accel.runtime.artifact import Artifact

app = typer.Typer()

Extend: TypeAlias = Annotated[
    int, typer.Option("--extend", help="With --generate: tokens at once, to speculate (N + 1).")
]
Batch: TypeAlias = Annotated[
    int,
    typer.Option("--batch", help="With --generate: texts that run together; 0: any number."),
]
KvCache: TypeAlias = Annotated[
    str,
    typer.Option("--kv-cache", help="With --generate: int8, fp8, int4, paged, sinks, h2o."),
]
Undo: TypeAlias = Annotated[
    bool, typer.Option("--undo", help="Take back a lossy pass that is past its bound.")
]


@app.command()
def compile(
    model: Annotated[
        str, typer.Argument(help="module:callable, file.py:callable, a package or a checkpoint.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help='"input_ids:i64[1,?128]". Repeatable.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: the model's name + .accel.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option("--generate", help="A language model: tokens of its key/value cache."),
    ] = 0,
    extend: Extend = 0,
    batch: Batch = 1,
    kv_cache: KvCache = "",
    target: Annotated[str, typer.Option("--target", help="See accel targets.")] = "cpu",
    dtype: Dtype = "",
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", "--passes", "-p", help='"quantize{bits=8}". Repeatable.'),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", help="Instead of all tensor-level passes.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Check every pass's contract. Slow.")
    ] = False,
    undo: Undo = False,
    no_kernels: Annotated[bool, typer.Option("--no-kernels", help="Generate no kernels.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile everything anew.")] = False,
    tune: Tune = "off",
    dump_dir: Annotated[str, typer.Option(help="Folder for numbered IR dumps.")] = "",
    print_after: Annotated[str, typer.Option(help='Print IR after this pass, or "all".')] = "",
    stop_after: Annotated[str, typer.Option(help="Stop the passes after this one.")] = "",
    fuel: Annotated[int, typer.Option(help="How many rewrites may happen; -1: all.")] = -1,
    seed: Annotated[int, typer.Option(help="Of the example inputs.")] = 0,
    load: Load = None,
    as_json: Json = False,
) -> None:
    """Compile a model into an artifact."""
    load_all_passes(load)
    path = output or Path(f"{Path(model.rpartition(':')[2]).stem}.accel")
    if not path.parent.is_dir():
        raise OptionError(f"there is no folder '{path.parent}'")
    if generate and inputs:
        raise OptionError("--generate takes no --input: a language model's inputs are token ids")
    cast = parse_dtype(dtype)
    options: dict[str, Any] = {
        "passes": ",".join(passes or []),
        "pipeline": pipeline,
        "validate": validate,
        "on_violation": "undo" if undo else "raise",
        "kernels": not no_kernels,
        "cache": not no_cache,
        "tune": tune,
        "dump_dir": dump_dir,
        "print_after": print_after,
        "stop_after": stop_after,
        "fuel": fuel,
    }
    if generate:
        sizes = {"capacity": generate, "extend": extend, "batch": batch, "cache": kv_cache}
        _generator(model, path, sizes, target, options, as_json, cast)
        return
    if extend or kv_cache or batch != 1:
        name = "--extend" if extend else "--kv-cache" if kv_cache else "--batch"
        raise OptionError(f"{name} has no effect without --generate")
    with progress(f"loading {model}", as_json):
        example = load_example(model, inputs or [], seed, cast)
    _package(example, path, target, options, as_json)


def _package(
    example: Example, path: Path, target: str, options: dict[str, Any], as_json: bool
) -> None:
    start = time.perf_counter()
    with progress(f"compiling {example.name}", as_json):
        accel.package(
            example.model,
            example.args,
            kwargs=example.kwargs,
            path=path,
            target=target,
            dynamic_shapes=example.dynamic,
            options=options,
        )
    report(path, time.perf_counter() - start, as_json)


def _generator(
    model: str,
    path: Path,
    sizes: dict[str, Any],
    target: str,
    options: dict[str, Any],
    as_json: bool,
    dtype: torch.dtype | None,
) -> None:
    with progress(f"loading {model}", as_json):
        named = load_model(model, dtype)
        tokenizer = None
        if named.checkpoint is not None and has_tokenizer(named.checkpoint):
            tokenizer = load_tokenizer(named.checkpoint)
    start = time.perf_counter()
    with progress(f"compiling {named.name}", as_json):
        accel.package_generator(
            named.model,
            path=path,
            **sizes,
            target=target,
            options=options,
            tokenizer=tokenizer,
        )
    report(path, time.perf_counter() - start, as_json)


def report(path: Path, seconds: float, as_json: bool) -> None:
    """What was made, read back from the file."""
    with Artifact(path) as artifact:
        data = describe(artifact, artifact.manifest.functions)
        ledger = Ledger.from_json(dict(artifact.manifest.ledger))
        data["report"] = artifact.manifest.report
    data["compile_seconds"] = seconds
    data["ledger"] = ledger.to_json()
    rows = [
        ("wrote", f"{path} ({format_bytes(data['bytes'])}) in {format_seconds(seconds)}"),
        ("target", data["target"]),
    ]
    for name, f in data["functions"].items():
        fallbacks = counts(f["fallbacks"])
        rows.append((f"@{name}", f"{counts(f['steps'])}; {f['kernels']} different kernels"))
        rows.append(("run by torch", fallbacks or "nothing"))
    emit(data, as_json, ledger.table(), *tuning_parts(data["report"]), facts(rows))
