"""float8 (e4m3fn) to float32, once for each generation of GPUs.

From sm_89 on two bytes are converted by one instruction. Before, the 7 low bits are moved to
float32's exponent, where they are the value divided by 2^120; 0x7F and 0xFF are NaN.
"""

from __future__ import annotations

NAME = "from_e4m3"
_FIRST_CAPABILITY = 89
_INSTRUCTION = """\
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
"""
_BITS = f"""\
    wide = byte.to(tl.int32)
    low = wide & 0x7F
    size = (low << 20).to(tl.float32, bitcast=True) * {2.0**120!r}
    size = tl.where(low == 0x7F, float("nan"), size)
    return tl.where(wide >= 0x80, -size, size)
"""


def resolved(source: str, capability: int, *, gluon: bool) -> str:
    """The source with the function's definition, if it calls it."""
    if f"{NAME}(" not in source:
        return source
    jit = "@gluon.jit" if gluon else "@triton.jit"
    body = _INSTRUCTION if capability >= _FIRST_CAPABILITY else _BITS
    place = source.index(jit)
    return f"{source[:place]}{jit}\ndef {NAME}(byte):\n{body}\n\n{source[place:]}"
