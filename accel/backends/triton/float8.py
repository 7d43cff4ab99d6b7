"""float8 (e4m3fn) to float32, once for each generation of GPUs.

From sm_89 on two bytes are converted by one instruction. Before, the 7 low bits are moved to
float32's exponent, where they are the value divided by 2^120; 0x7F and 0xFF are NaN. Tensor cores
multiply float8 from sm_89 on; before, float16, which holds every one of its values.
"""

from __future__ import annotations

NAME = "from_e4m3"
OPERAND = "operand_e4m3"  # of a product on tensor cores
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

_AS_IT_IS = """\
    return byte.to(tl.float8e4nv, bitcast=True)
"""
_AS_HALF = f"""\
    return {NAME}(byte).to(tl.float16)
"""


def resolved(source: str, capability: int, *, gluon: bool) -> str:
    """The source with the definitions of those functions that it calls."""
    new = capability >= _FIRST_CAPABILITY
    source = _with(source, OPERAND, _AS_IT_IS if new else _AS_HALF, gluon)
    return _with(source, NAME, _INSTRUCTION if new else _BITS, gluon)


def _with(source: str, name: str, body: str, gluon: bool) -> str:
    if f"{name}(" not in source:
        return source
    jit = "@gluon.jit" if gluon else "@triton.jit"
    place = source.index(jit)
    return f"{source[:place]}{jit}\ndef {name}(byte):\n{body}\n\n{source[place:]}"
