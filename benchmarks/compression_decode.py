"""Seconds of one decode step's work with compressed weights, SmolLM2-135M on the CPU.

    python -m benchmarks.compression_decode

Two programs for each format: `linears` runs all 210 linears of the model on one row each, so that
hardly more than weights is read; `token` is the whole model on one token, output projection
included. All systems run in one process, in turns, and outputs are checked before anything is
timed. Results go to `benchmarks/results/compression_decode.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import accel
from accel.cli.timing import interleaved_medians, relative_error
from accel.frontends.checkpoints import find_checkpoint, load_checkpoint
from accel.frontends.export import capture
from accel.ir import interpret
from accel.passes.manager import run_pipeline
from benchmarks.compression import MODEL
from benchmarks.measure import THREADS, machine, store_results

FORMATS: dict[str, str] = {
    "fp32": "",
    "int8": "quantize{tied=share}",
    "int4-g64": "quantize{bits=4,group=64,tied=share}",
    "nf4-g64": "quantize{format=nf4,group=64,tied=share}",
}
# The interpreter and generated kernels sum in other orders; the formats' own errors are in both.
LARGEST_ERROR = 1e-4


class Linears(nn.Module):
    """Every linear of every layer on a row of its own: narrow [30, 1, 576], wide [30, 1, 1536]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = model.model.model.layers

    def forward(self, narrow: Tensor, wide: Tensor) -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for layer, x, y in zip(self.layers, narrow.unbind(), wide.unbind()):
            attention, mlp = layer.self_attn, layer.mlp
            made += [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
            made += [attention.o_proj(x + 1), mlp.gate_proj(x - 1), mlp.up_proj(x - 1)]
            made.append(mlp.down_proj(y))
        return tuple(made)


def programs(model: nn.Module, *inputs: Tensor) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Eager, and accel with each format, as functions of no arguments; checked."""
    calls: dict[str, Callable[[], Sequence[Tensor]]] = {}

    def eager() -> Sequence[Tensor]:
        with torch.inference_mode():
            return leaves(model(*inputs))

    calls["eager fp32"] = eager
    for name, passes in FORMATS.items():
        compiled = accel.compile(model, inputs=inputs, options={"passes": passes})
        reference = capture(model, inputs)
        run_pipeline(reference, passes or "dce")
        wanted = interpret(reference.main, inputs, reference.weights)
        error = relative_error(leaves(compiled(*inputs)), wanted)
        if error > LARGEST_ERROR:
            raise RuntimeError(f"{name} is off by {error:.2g} from the interpreter")
        calls[name] = lambda compiled=compiled: leaves(compiled(*inputs))  # type: ignore[misc]
    return calls


def leaves(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def table_of(rows: dict[str, dict[str, float]]) -> Table:
    table = Table("format", title="SmolLM2-135M, one row, milliseconds (times as fast as fp32)")
    for part in rows:
        table.add_column(part, justify="right")
    for name in next(iter(rows.values())):
        cells = []
        for seconds in rows.values():
            ratio = seconds["fp32"] / seconds[name]
            cells.append(f"{seconds[name] * 1e3:.2f} ({ratio:.2f})")
        table.add_row(name, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One decode step with compressed weights.")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each system")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    model = load_checkpoint(find_checkpoint(MODEL))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(30, 1, width, generator=generator) for width in (576, 1536)]
    parts = {
        "linears": programs(Linears(model).eval(), *rows),
        "token": programs(model, torch.tensor([[504]])),
    }
    seconds = {
        name: interleaved_medians(calls, rounds=given.rounds, seconds=0.3)
        for name, calls in parts.items()
    }
    store_results("compression_decode", {"machine": machine(), "seconds": seconds})
    Console().print(table_of(seconds))


if __name__ == "__main__":
    main()
