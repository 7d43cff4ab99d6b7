"""The division in a logistic function: one instruction, and what keeps small results exact.

Triton divides by a sequence that is right for all numbers. 1 / (1 + p) with a power p needs less:
the divisor lies between 1 and 2^128. The hardware's reciprocal makes zero of results below 2^-126,
so that it gets a sixteenth of the divisor, which is exact.
"""

from __future__ import annotations

import re

from accel.backends.triton.program import Program

_DIVISION = re.compile(r"1\.0 / (\(1\.0 \+ \w+\))")
_HELPER = """\
@gluon.jit
def inverse(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x * 0.0625],
                                     dtype=tl.float32, is_pure=True, pack=1) * 0.0625
"""


def quick_inverses(program: Program) -> None:
    """Makes these divisions of a program in Gluon reciprocals."""
    helpers = [_DIVISION.sub(r"inverse\1", text) for text in program.helpers]
    if helpers != program.helpers:
        program.helpers = [_HELPER, *helpers]
