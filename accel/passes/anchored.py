"""What the passes share that make a kernel around each op of some names, its anchor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from accel.ir.capability import KernelGenerator
from accel.ir.module import Function, Module, Op
from accel.passes.base import Context, Pass
from accel.passes.outline import finish_outline, is_full, outline


class AnchoredPass(Pass):
    """Goes through the anchors of every function. `order` numbers a function's ops; `kind` is the
    kind of kernel that the generator is asked for ("": the anchor's own name)."""

    anchors: ClassVar[tuple[str, ...]]
    kind: ClassVar[str] = ""

    def run(self, module: Module, context: Context) -> None:
        generator = context.generator
        if generator is None:
            return
        for function in module.functions.values():
            order = {op: i for i, op in enumerate(function.ops)}
            for op in function.ops:
                if op.name not in self.anchors:
                    continue
                reason = self._refusal(op, generator)
                if reason is None:
                    self._select(op, context, generator, order)
                else:
                    context.miss(self.name, op, reason)
            self._after_anchors(function, context, generator, order)

    def _refusal(self, op: Op, generator: KernelGenerator) -> str | None:
        """Why the generator makes no kernel around an anchor; None if it does."""
        return generator.supports_anchor(op, self.kind or op.name)

    @abstractmethod
    def _select(
        self, op: Op, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        """Makes a kernel around an anchor that the generator takes, or says why not."""

    def _after_anchors(
        self, function: Function, context: Context, generator: KernelGenerator, order: dict[Op, int]
    ) -> None:
        """What is left to do in a function."""

    def _outline(
        self,
        ops: Sequence[Op],
        kind: str,
        generator: KernelGenerator,
        order: dict[Op, int],
        *,
        duplicate: Sequence[Op] = (),
        place: Op | None = None,
        constants: bool = True,
    ) -> None:
        """Puts `ops` (in order) into a kernel in front of `place`, which is the last of them unless
        told; `constants`: with copies of the 0-d constants that they read."""
        place = ops[-1] if place is None else place
        attributes = {"backend": generator.name, "kind": kind}
        inline = is_full if constants else lambda value: False
        kernel = outline(ops, "kernel", attributes, self.name, duplicate=duplicate, inline=inline)
        assert place.parent is not None
        place.parent.insert_before(kernel, place)
        order[kernel] = order[place]
        finish_outline(kernel, ops)
