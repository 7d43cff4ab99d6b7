"""What an attention kernel's op says, whichever of the attention ops it is."""

from __future__ import annotations

from dataclasses import dataclass

from accel.ir.module import Op, Value
from accel.ir.types import Dim

OPS = ("attention", "flash_attention", "flash_attention_backward")


@dataclass(frozen=True)
class Facts:
    """Operands and attributes that `attention`, `flash_attention` and its gradients share."""

    q: Value
    k: Value
    v: Value
    mask: Value | None
    sinks: Value | None
    scale: float
    causal: bool
    offset: Dim
    window: int | None
    softcap: float | None


def facts_of(op: Op) -> Facts:
    """What one of `OPS` says."""
    operands = op.arguments()
    sinks = None
    if op.name == "attention":
        q, k, v, mask, sinks = operands
    elif op.name == "flash_attention":
        q, k, v, mask = operands
    else:
        _, q, k, v, _, _, mask = operands
    attributes = op.definition.complete_attributes(op.attributes)
    return Facts(
        q,
        k,
        v,
        mask,
        sinks,
        float(attributes["scale"]),
        bool(attributes["causal"]),
        attributes.get("offset", 0),
        attributes["window"],
        attributes["softcap"],
    )
