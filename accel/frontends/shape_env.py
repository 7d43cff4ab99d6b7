"""A `ShapeEnv` that does not note where in Python a symbol or a guard comes from.

PyTorch writes that into its own messages. Here errors name the user's line already
(`accel.frontends.trace.FrameLocator`), and to find PyTorch's own files it imports torch.export and
AOTAutograd: 0.2 to 0.9 s, more than most captures take.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch._guards import GuardSource, SLoc, Source
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class PlainShapeEnv(ShapeEnv):
    """Symbols, ranges and guards, without stacks.

    `counts`: symbols of numbers that were read from tensors (`accel.frontends.selections`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts: set[Any] = set()

    def _get_stack_summary(self, *args: Any, **kwargs: Any) -> tuple[SLoc, str]:
        return SLoc(None, None), ""


@dataclass(frozen=True)
class Label(Source):
    """Names a size to the `ShapeEnv`. Dynamo's own sources would do, but importing Dynamo takes
    longer than most captures."""

    label: str

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

    @property
    def _name_template(self) -> str:
        return self.label

    if inspect.isfunction(Source.__dict__.get("name")):  # torch before name became an attribute

        def name(self) -> str:  # type: ignore[override]
            return self.label
