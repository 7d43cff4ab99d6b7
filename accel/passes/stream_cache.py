"""Tokens see the first tokens of their text and the last ones: a cache of one size for any text.

A window alone loses the first tokens, on which attention puts the weight that no other token
needs, and the text falls apart; a few of them kept (`sinks`) hold it together. Keys are kept
without their rotary embedding and turned by their place in the cache, so that no distance is larger
than the model has seen. The pass runs on @main; `insert_kv_cache`, which comes after it, keeps
`sinks` tokens and a ring of `window`.

Paper: Xiao et al., 2024 (StreamingLLM). Contract: approximate (texts up to `sinks` + `window`
tokens are unchanged), and decode equivalence of what it becomes. Before and after:

    %2 = "accel.rope"(%q, %cos, %sin) ...
    %3 = "accel.rope"(%k, %cos, %sin) ...
    %4 = "accel.attention"(%2, %3, %v) {scale = 0.25, causal = true} ...

    %4 = "accel.streaming_attention"(%q, %k, %v, %cos, %sin) {sinks = 4, window = 508} ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from accel.errors import CaptureError, OptionError
from accel.ir.builder import Builder
from accel.ir.module import Module, Op
from accel.passes.base import Context, Contract, Pass, approximate, register_pass


@register_pass
@dataclass
class StreamCache(Pass):
    """Attention sinks and a window.

    Options:
        sinks: tokens at the beginning of a text that all others see.
        window: how many of the last tokens a token sees, itself included.
        bound: relative error of results to promise, on texts as long as those that are measured.
    """

    name: ClassVar[str] = "stream_cache"
    contract: ClassVar[Contract] = approximate("relative_error", 1.0)

    sinks: int = 4
    window: int = 508
    bound: float = 1.0

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1 or self.bound <= 0:
            raise OptionError(
                f"{self.name}: sinks = {self.sinks}, window = {self.window}, bound = {self.bound}"
            )

    def promise(self) -> Contract:
        return approximate("relative_error", self.bound)

    def run(self, module: Module, context: Context) -> None:
        done = 0
        for op in list(module.main.ops):
            if op.name != "attention" or not op.attribute("causal"):
                continue
            window = op.attribute("window")
            if window is not None and window <= self.window:
                context.miss(self.name, op, f"it has a window of {window} tokens already")
                continue
            _check(op)
            if context.rewrite(self.name, op):
                self._rewrite(op)
                done += 1
        context.notes |= {"streaming": done, "slots": self.sinks + self.window}

    def _rewrite(self, op: Op) -> None:
        q, k = (value.op for value in op.operands[:2])
        assert q is not None and k is not None
        b = Builder(before=op, made_by=self.name)
        b.location = op.location
        operands = [q.operands[0], k.operands[0], op.operands[2], *k.operands[1:]]
        attributes = {
            "scale": op.attribute("scale"),
            "sinks": self.sinks,
            "window": self.window,
            "style": k.attribute("style"),
            "softcap": op.attribute("softcap"),
        }
        op.replace_with(b.op("streaming_attention", operands, attributes).results)


def _check(op: Op) -> None:
    """Raises CaptureError unless queries and keys are turned as a whole, by the same angles."""
    q, k, _, *others = op.arguments()
    ropes = [value.op for value in (q, k)]
    why = ""
    if any(o is not None for o in others):
        why = "it has a mask or sinks of its own"
    elif any(rope is None or rope.name != "rope" for rope in ropes):
        why = "its queries and keys do not come from rotary embeddings of whole heads"
    elif op.attribute("offset") != 0:
        why = "its tokens see tokens after them"
    else:
        first, second = ropes
        assert first is not None and second is not None
        if first.operands[1:] != second.operands[1:] or first.attributes != second.attributes:
            why = "its queries and keys are turned by different angles"
    if why:
        raise CaptureError(
            f"stream_cache: accel.attention cannot keep a window and sinks: {why}",
            where=str(op.location or ""),
            advice="choose another kind of cache",
        )
