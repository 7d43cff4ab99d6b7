"""Encoder-decoders that read their source in blocks: one program for sources of any length.

Such a model pads to whole blocks and reshapes, and a capture notes what it saw: one block, a length
that is no multiple. `any_source` captures once more without telling one block from several
(PyTorch's size-oblivious shapes), and drops each condition that makes no difference: sources that
break it give the model's own logits. These are trials, with random tokens and the model's weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as shape_config
from torch import Tensor, nn

from accel.errors import AccelError, CaptureError
from accel.frontends.export import capture
from accel.ir.expr import parse_expr
from accel.ir.interpret import interpret
from accel.ir.module import Module

_SIZES = (2, 3, 9, 40, 130, 300)
_LONGEST = 512  # of sources that are tried
_TRIED = 2  # sources that break a condition
_TEXT = 4
_SAME = 1e-3
_HOLDS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt,
    "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def any_source(
    plain: nn.Module,
    form: nn.Module,
    made: Module | None,
    examples: Sequence[Tensor],
    shapes: Sequence[Any],
) -> Module | None:
    """A capture of `form` for more sources than `made` takes (None: it could not be captured), or
    `made` itself. Both are to compute what `plain` does."""
    first = next(plain.parameters(), torch.zeros(()))
    if first.is_meta or (made is not None and not made.main.metadata["guards"]):
        return made
    try:
        with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            wider = capture(form, tuple(examples), dynamic_shapes=tuple(shapes))
    except CaptureError:
        return made
    trial = _Trial(plain, wider, examples[0].shape[0], first.device)
    kept = [g for g in wider.main.metadata["guards"] if not trial.makes_no_difference(g)]
    wider.main.metadata["guards"] = kept
    if not all(trial.is_same(n) for n in _SIZES if trial.holds(kept, n)):
        return made
    return wider


class _Trial:
    """Compares a program with the model for sources of some lengths."""

    def __init__(self, plain: nn.Module, made: Module, rows: int, device: torch.device) -> None:
        self.plain, self.made, self.rows, self.device = plain, made, rows, device
        self._known: dict[int, bool] = {}
        limit = made.main.symbols["source"].max if "source" in made.main.symbols else 0
        self.longest = min(limit or _LONGEST, _LONGEST)
        tables = [op.operands[0].shape[0] for op in made.main.ops if op.name == "embedding"]
        self.high = tables[0] if tables and isinstance(tables[0], int) else 2

    def holds(self, guards: Sequence[dict[str, str]], source: int) -> bool:
        return source <= self.longest and all(self._holds(g, source) for g in guards)

    def _holds(self, guard: dict[str, str], source: int) -> bool:
        sizes = {"source": source, "length": _TEXT}
        sides = []
        for text in (guard["left"], guard["right"]):
            side = sympy.sympify(parse_expr(text))
            sides.append(side.subs({s: sizes.get(s.name, self.rows) for s in side.free_symbols}))
        return bool(_HOLDS[guard["relation"]](*sides))

    def makes_no_difference(self, guard: dict[str, str]) -> bool:
        """Whether sources that break a condition are computed as well."""
        broken = [n for n in range(2, self.longest + 1) if not self._holds(guard, n)]
        return bool(broken) and all(self.is_same(n) for n in (*broken[:_TRIED], broken[-1]))

    def is_same(self, source: int) -> bool:
        if source not in self._known:
            self._known[source] = self._compare(source)
        return self._known[source]

    def _compare(self, source: int) -> bool:
        generator = torch.Generator().manual_seed(source)
        ids = [
            torch.randint(0, self.high, (self.rows, n), generator=generator).to(self.device)
            for n in (source, _TEXT)
        ]
        try:
            with torch.no_grad():
                wanted = self.plain(*ids).double()
            found = interpret(self.made.main, ids, self.made.weights)[0].double()
        except (AccelError, RuntimeError, IndexError, ValueError):
            return False  # of such a source there is no program: its condition stays
        return float((found - wanted).abs().max()) <= _SAME * float(wanted.abs().max())
