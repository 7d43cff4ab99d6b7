"""Functions that choose the next token on the device: what a recorded step does after @decode.

    advance(logits [B, 1, V], token [B, 1], position, history [B, N]) -> token, position, history
    advance_until(..., running [B, 1], pad [], stops [1, K])             -> ..., running

`position` is @decode's: [], or [B] where texts may be of unequal length. The most probable token
becomes `token`, `position` moves on by one, and the history holds the token
at its position. @advance_until also ends rows: one that has met a token of `stops` gets `pad` from
then on. All of it is state, donated, so that a step changes memory in place and nothing leaves the
device. Compiled with the model these are a few fused kernels; other choices are torch's.
"""

from __future__ import annotations

import torch

from accel.ir.builder import Builder
from accel.ir.module import Function, Module, SymbolInfo
from accel.ir.types import TensorType, symbol_names

STOPS = 16  # tokens that `advance_until` compares with


def add_choices(module: Module, capacity: int) -> None:
    """Adds both functions to a module with @decode."""
    for name, stops in (("advance", 0), ("advance_until", STOPS)):
        module.add(_advance(name, module.functions["decode"], capacity + 2, stops))


def _advance(name: str, decode: Function, columns: int, stops: int) -> Function:
    logits, ids = decode.results[0].type, decode.args[0].type
    rows, long = logits.shape[0], torch.int64
    given = {
        "logits": logits,
        "token": ids,
        "position": decode.args[1].type,
        "history": TensorType((rows, columns), long),
    }
    if stops:
        given["running"] = TensorType((rows, 1), torch.bool)
        given["pad"] = TensorType((), long)
        given["stops"] = TensorType((1, stops), long)
    function = Function(name)
    args = {label: function.body.add_arg(type_, label) for label, type_ in given.items()}
    b = Builder(function.body)
    token = b.argmax(args["logits"], axis=2)
    position = b.add(args["position"], b.scalar(1, long))
    made = []
    if stops:
        token = b.where(args["running"], token, args["pad"])
        ended = b.any(b.eq(token, args["stops"]), axes=(1,), keepdim=True)
        made.append(b.logical_and(args["running"], b.logical_not(ended)))
    history = b.dynamic_update(args["history"], token, position, axis=1)
    results = [b.cast_to(token, ids.dtype), position, history, *made]
    b.op("return", results)
    function.donates = {i: 1 + i for i in range(len(results))}
    symbols = symbol_names(rows) if not isinstance(rows, int) else ()
    function.symbols = {s: SymbolInfo(1, decode.symbols[s].max) for s in symbols}
    function.metadata = {
        "arguments": [{"name": label, "kind": "input"} for label in given],
        "results": [{"kind": "output"}] * len(results),
        "guards": [],
    }
    return function
