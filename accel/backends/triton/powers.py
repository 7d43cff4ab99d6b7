"""Powers of 2 as weights of a softmax: one instruction each.

A weight of 2^-127 is nothing beside the largest one, which is 1. So weights need no subnormal
numbers, for which Triton's own `exp2` spends three more instructions a number; attention has as
many powers as pairs, and they, not the products, are its limit.
"""

from __future__ import annotations

from accel.backends.triton.program import Program

_HELPER = """\
@{}.jit
def power(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)
"""


def quick_powers(program: Program) -> None:
    """Makes `tl.exp2` of float32 in a program such powers; a model's functions are libdevice's."""
    program.lines = program.lines.replace("tl.exp2(", "power(")
    helpers = [text.replace("tl.exp2(", "power(") for text in program.helpers]
    program.helpers = [_HELPER.format("gluon" if program.gluon else "triton"), *helpers]
