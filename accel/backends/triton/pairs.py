"""Rounding to 16 bits and back, two numbers an instruction.

An epilogue rounds wherever the model does. Left alone, the compiler converts one number at a time
where the result is widened again, on units that do a quarter of what others do; the instruction for
two is not slower than an addition.
"""

from __future__ import annotations

import re

_ROUNDED = re.compile(r"\b(\w+)\.to\(tl\.(bfloat16|float16)\)\.to\(tl\.float32\)")
_INSTRUCTION = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}


def pairwise(source: str) -> tuple[list[str], str]:
    """Functions that round two numbers at a time, and the source (in Gluon) with calls of them."""
    kinds = sorted({found[2] for found in _ROUNDED.finditer(source)})
    functions = [
        f"@gluon.jit\ndef to_{kind}(x):\n"
        f'    return tl.inline_asm_elementwise("{_INSTRUCTION[kind]} $0, $2, $1;", "=r,f,f", [x], '
        f"dtype=tl.{kind},\n                                     is_pure=True, pack=2)"
        f".to(tl.float32)\n"
        for kind in kinds
    ]
    return functions, _ROUNDED.sub(r"to_\2(\1)", source)
