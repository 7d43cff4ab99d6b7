"""A `ShapeEnv` that does not note where in Python a symbol or a guard comes from.

PyTorch writes that into its own messages. Here errors name the user's line already
(`accel.frontends.trace.FrameLocator`), and to find PyTorch's own files it imports torch.export and
AOTAutograd: 0.2 to 0.9 s, more than most captures take.
"""

from __future__ import annotations

from typing import Any

from torch._guards import SLoc
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class PlainShapeEnv(ShapeEnv):
    """Symbols, ranges and guards, without stacks."""

    def _get_stack_summary(self, *args: Any, **kwargs: Any) -> tuple[SLoc, str]:
        return SLoc(None, None), ""
