"""The capture of a language model: a forward over whole texts, of any length.

A causal model takes ids [B, S]; an encoder-decoder takes source ids [B, T] and ids [B, S]. Models
that count to the length of their text (recurrent ones: `for t in range(length)`) have no capture
with a symbol for it: they are captured at three lengths, their loops rolled up, and compared
(`accel.passes.reroll`, `accel.passes.generalize`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from accel.compiler.plain_forward import (
    EncoderDecoder,
    SourceAndText,
    masked_forward,
    plain_forward,
)
from accel.compiler.source_sizes import any_source
from accel.config import logger
from accel.errors import AccelError, CaptureError, FixedSizeError
from accel.frontends.export import capture
from accel.frontends.symbols import SIZED_BY_DATA
from accel.frontends.token_loops import token_by_token
from accel.ir.interpret import interpret
from accel.ir.module import Module, SymbolInfo
from accel.passes.generalize import generalize
from accel.passes.manager import run_pipeline
from accel.passes.reroll import Reroll

_EXAMPLE_TOKENS = 8
_EXAMPLE_SOURCE = 9
_EXAMPLE_ROWS = 2
# Lengths that hardly any other size of a model is equal to.
_LENGTHS = (11, 13, 17)
# How far logits of a long text may be off, relative to the largest: rounding adds up in loops.
_SAME = 0.05
# The same of texts that are no longer than this.
_LONG, _SAME_ROWS = 24, 1e-3
_log = logger("compiler")


def capture_text(model: Any, capacity: int, batch: int = 1) -> Module:
    """@main: ids -> logits [B, S, V]; S, the source's length, and B unless it is 1 are symbols.

    Args:
        model: a module or callable as `compile_generator` takes it.
        capacity: the longest text.
        batch: rows; 0 for any number. `insert_kv_cache` makes a number of the symbol.

    Raises CaptureError for what cannot be captured, naming the place.
    """
    plain = plain_forward(model)
    pair = isinstance(plain, (EncoderDecoder, SourceAndText))
    rows = 1 if batch == 1 else _EXAMPLE_ROWS
    first: dict[int, Any] = {} if batch == 1 else {0: Dim("batch")}
    source = {**first, 1: Dim("source", min=2, max=_longest_source(model, capacity))}
    text = {**first, 1: Dim("length", min=2, max=capacity)}
    examples = [torch.zeros(rows, min(_EXAMPLE_TOKENS, capacity), dtype=torch.int64)]
    shapes = [text]
    if pair:
        examples.insert(0, torch.zeros(rows, _EXAMPLE_SOURCE, dtype=torch.int64))
        shapes.insert(0, source)
    with token_by_token(plain):
        try:
            made = capture(plain, tuple(examples), dynamic_shapes=tuple(shapes))
            return (any_source(plain, plain, made, examples, shapes) if pair else None) or made
        except FixedSizeError:
            if pair:
                raise
            return _capture_loops(plain, rows, first, capacity)
        except CaptureError as error:
            other = _capture_otherwise(plain, examples, shapes, capacity)
            if other is None:
                raise error from error.__cause__
            return other


def _capture_otherwise(
    plain: nn.Module, examples: list[Tensor], shapes: list[dict[int, Any]], capacity: int
) -> Module | None:
    """The capture of a model that looks for padding, or that runs parts of itself for some tokens
    only, as mixtures of experts do. None where that does not help."""
    masked, pair = masked_forward(plain), len(examples) == 2
    for form, selections in ((masked, False), (plain, True), (masked, True)):
        if form is None:
            continue
        try:
            made = capture(
                form, tuple(examples), dynamic_shapes=tuple(shapes), selections=selections
            )
        except CaptureError as error:
            _log.debug("another capture of the model: %s", error)
            continue
        if selections:
            _check_selections(plain, made, examples, capacity)
            return made
        return (any_source(plain, form, made, examples, shapes) if pair else None) or made
    for form in (plain, masked) if pair else ():
        found = None if form is None else any_source(plain, form, None, examples, shapes)
        if found is not None:
            return found
    return None


def _check_selections(
    plain: nn.Module, made: Module, examples: list[Tensor], capacity: int
) -> None:
    """Raises CaptureError where the program differs from a model that selects tokens, on texts in
    which not everything is selected, and on longer ones."""
    if next(plain.parameters(), torch.zeros(())).is_meta:
        return
    device = next(plain.parameters(), torch.zeros(())).device
    generator = torch.Generator().manual_seed(0)
    high = _vocabulary(made)
    for tokens in (2, 3, min(_LONG, capacity)):
        ids = [
            torch.randint(0, high, (x.shape[0], tokens), generator=generator).to(device)
            for x in examples
        ]
        with torch.no_grad():
            wanted = plain(*ids).double()
        found = interpret(made.main, ids, made.weights)[0].double()
        if not float((found - wanted).abs().max()) <= _SAME_ROWS * float(wanted.abs().max()):
            raise CaptureError(
                "the model runs parts of itself for tokens that a mask selects, and those look at "
                "each other, or something else happens where there are none",
                advice=SIZED_BY_DATA,
            )


def _capture_loops(plain: nn.Module, rows: int, first: dict[int, Any], capacity: int) -> Module:
    """From captures of three lengths."""
    modules = []
    for tokens in _LENGTHS:
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        module = capture(plain, (ids,), dynamic_shapes=(first,) if first else None)
        run_pipeline(module, [Reroll(tokens)])
        modules.append(module)
    made = generalize(modules, _LENGTHS, SymbolInfo(2, capacity))
    _check_longest(plain, made, rows, capacity)
    return made


def _check_longest(plain: nn.Module, made: Module, rows: int, capacity: int) -> None:
    """Raises CaptureError where the longest text shows that short ones did not tell everything:
    a model may work in blocks that they do not fill, or look back further than they reach."""
    first = next(plain.parameters(), torch.zeros(()))
    if first.is_meta:
        return
    high = _vocabulary(made)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, high, (rows, capacity), generator=generator).to(first.device)
    with torch.no_grad():
        wanted = _last(plain(ids)).double()
    try:
        found = _last(interpret(made.main, [ids], made.weights)[0]).double()
    except (AccelError, RuntimeError, IndexError, ValueError) as error:
        raise _too_long(capacity, str(error)) from error
    if not float((found - wanted).abs().max()) <= _SAME * float(wanted.abs().max()):
        raise _too_long(capacity, "its logits differ")


def _vocabulary(made: Module) -> int:
    tables = [op.operands[0].shape[0] for op in made.main.ops if op.name == "embedding"]
    return tables[0] if tables and isinstance(tables[0], int) else 2


def _last(logits: Tensor) -> Tensor:
    """Of the last token; a model may return only those."""
    return logits if logits.dim() == 2 else logits[:, -1]


def _too_long(capacity: int, why: str) -> CaptureError:
    return CaptureError(
        f"the model counts to the length of its text, and one of {capacity} tokens does not go on "
        f"as {_LENGTHS[-1]} tokens do: {why}",
        advice="choose a smaller capacity: it may work in blocks that shorter texts do not fill",
    )


def _longest_source(model: Any, capacity: int) -> int:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 1 else max(capacity, 1024)
