"""Elementary functions of float32, as straight-line arithmetic that LLVM vectorizes.

Calls of the C library are scalar and ten times slower. Each function here reduces its argument,
evaluates a minimax polynomial with fused multiply-adds, and is right for infinities, NaN, denormals
and huge arguments; `tests/backends/test_tvm_math.py` measures every one against float64 (errors
stay within 4 units in the last place, most within 2). Coefficients were fitted for this file by
reweighted least squares, rounding one coefficient to float32 at a time and refitting the rest.

Arguments are named values (`Block.let`): functions use them more than once.

No value is ever converted to an integer unless it is in range, since LLVM leaves the result open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from accel.backends.tvm import tir
from accel.backends.tvm.tir import Block, Expr, bits, cast, const, f32, intrinsic, select

# 1.5 * 2^23: adding it rounds a small float to an integer, which is then in the low bits.
_ROUNDER = 12582912.0
_LOG2_E = 1.44269504088896340736
_LN2_HIGH = 0.693147182464599609375  # float32(ln 2)
_LN2_LOW = math.log(2.0) - _LN2_HIGH

_EXP = (0.5, 0.1666666716337204, 0.041666463017463684, 0.008333205245435238,
        0.001393509446643293, 0.00019946828251704574)  # fmt: skip
_EXPM1 = (0.5, 0.1666666716337204, 0.04166648909449577, 0.008333208039402962,
          0.0013932674191892147, 0.0001994426711462438)  # fmt: skip
_LOG = (0.33333316445350647, -0.25000816583633423, 0.2000230997800827, -0.16624337434768677,
        0.14180563390254974, -0.13130420446395874, 0.12886661291122437,
        -0.07860954850912094)  # fmt: skip
_TANH = (-0.3333328366279602, 0.13331486284732819, -0.05374317243695259, 0.020649708807468414,
         -0.0057162027806043625)  # fmt: skip
_ERF_SMALL = (0.12837916612625122, -0.3761262893676758, 0.11283618211746216, -0.02685512602329254,
              0.005190733820199966, -0.0008030761382542551, 7.920368079794571e-05)  # fmt: skip
_ERF_LARGE = (1.1285965442657471, 0.6354237794876099, 0.10564330220222473, -0.02306523360311985,
              0.00316612864844501, -0.0001331448437577352, -2.9508590159821324e-05,
              3.6430217278393684e-06)  # fmt: skip
# erf(x) = x P(x^2) / Q(x^2) below 3.95: coarser than the two above (5 units), and twice as fast.
_ERF_OVER = (1.1283791065216064, 0.1915496587753296, 0.052875369787216187, 0.0038081372622400522,
             0.0002846877323463559, 2.0259194570826367e-06)  # fmt: skip
_ERF_UNDER = (1.0, 0.5030891299247742, 0.1145593672990799, 0.015055038966238499,
              0.0011707209050655365, 3.783192005357705e-05)  # fmt: skip
_ERF_LIMIT = 3.95
_SIN = (-0.1666666666663145, 0.00833333332524501, -0.000198412638078608, 2.7555354453644205e-06,
        -2.4761407144236198e-08)  # fmt: skip
_COS = (0.04166666666660194, -0.0013888888878232262, 2.480158095284771e-05, -2.75555636586817e-07,
        2.064751127079502e-09)  # fmt: skip


def polynomial(x: Expr, coefficients: Sequence[float], block: Block) -> Expr:
    """Horner's rule, lowest coefficient first, in x's dtype.

    Each step is named: TVM's search for fused multiply-adds takes time exponential in depth.
    """
    dtype = tir.dtype_of(x)
    result: Expr = const(coefficients[-1], dtype)
    for c in reversed(coefficients[:-1]):
        result = block.let(result * x + const(c, dtype), "poly")
    return result


def _power_of_two(n: Expr) -> Expr:
    """2^n for an int32 in [-126, 127]."""
    return bits((n + const(127, "int32")) << const(23, "int32"), "float32")


def _scale(value: Expr, n: Expr, block: Block) -> Expr:
    """value * 2^n in two exact steps, so that results may be denormal or infinite."""
    half = block.let(n >> const(1, "int32"), "half")
    return value * _power_of_two(half) * _power_of_two(n - half)


def _reduce_exp(x: Expr, block: Block) -> tuple[Expr, Expr]:
    """r and n with x = n ln 2 + r and |r| <= ln 2 / 2."""
    shifted = block.let(x * f32(_LOG2_E) + f32(_ROUNDER), "shifted")
    whole = block.let(shifted - f32(_ROUNDER), "whole")
    r = block.let(whole * f32(-_LN2_HIGH) + x, "r")
    r = block.let(whole * f32(-_LN2_LOW) + r, "r")
    n = block.let(bits(shifted, "int32") - bits(f32(_ROUNDER), "int32"), "n")
    return r, n


def _clip(x: Expr, low: float, high: float, block: Block) -> Expr:
    """x inside of [low, high]; NaN stays NaN."""
    x = block.let(x, "x")
    x = block.let(select(x > f32(high), f32(high), x), "x")
    return block.let(select(x < f32(low), f32(low), x), "x")


def exp(x: Expr, block: Block) -> Expr:
    r, n = _reduce_exp(_clip(x, -104.0, 89.0, block), block)
    p = block.let(r * r * polynomial(r, _EXP, block) + r, "p")
    return _scale(p + f32(1.0), n, block)


def exp2(x: Expr, block: Block) -> Expr:
    x = _clip(x, -151.0, 129.0, block)
    shifted = block.let(x + f32(_ROUNDER), "shifted")
    fraction = block.let(x - (shifted - f32(_ROUNDER)), "fraction")
    n = block.let(bits(shifted, "int32") - bits(f32(_ROUNDER), "int32"), "n")
    r = block.let(fraction * f32(_LN2_HIGH) + fraction * f32(_LN2_LOW), "r")
    p = block.let(r * r * polynomial(r, _EXP, block) + r, "p")
    return _scale(p + f32(1.0), n, block)


def expm1(x: Expr, block: Block) -> Expr:
    r, n = _reduce_exp(_clip(x, -20.0, 89.0, block), block)
    p = block.let(r * r * polynomial(r, _EXPM1, block) + r, "p")
    # 2^n (p + 1) - 1 = 2^n p + (2^n - 1), computed at half the scale: n may be 128.
    half = block.let(_power_of_two(n - const(1, "int32")), "half")
    grown = (half * p + (half - f32(0.5))) * f32(2.0)
    # The sum above loses the sign of zero.
    return select(tir.eq(x, f32(0.0)), x, grown)


def _split_log(x: Expr, block: Block) -> tuple[Expr, Expr]:
    """f and e (both float32) with x = 2^e (1 + f) and 1 + f in [sqrt(1/2), sqrt(2))."""
    tiny = x < f32(2.0**-126)
    raw = block.let(bits(block.let(select(tiny, x * f32(2.0**23), x), "x"), "int32"), "raw")
    e = block.let((raw - const(0x3F3504F3, "int32")) >> const(23, "int32"), "e")
    mantissa = bits(raw - (e << const(23, "int32")), "float32")
    exponent = cast(e, "float32") - select(tiny, f32(23.0), f32(0.0))
    return block.let(mantissa - f32(1.0), "f"), block.let(exponent, "exponent")


def _log_tail(f: Expr, block: Block) -> Expr:
    """log(1 + f) - f."""
    square = block.let(f * f, "square")
    return block.let(f * square * polynomial(f, _LOG, block) - f32(0.5) * square, "tail")


def _log_specials(x: Expr, result: Expr, block: Block) -> Expr:
    """Zero, negative, infinite and NaN arguments of a logarithm."""
    result = select(x < f32(math.inf), result, x)  # inf; and NaN, which compares false
    result = select(tir.eq(x, f32(0.0)), f32(-math.inf), result)
    return select(x < f32(0.0), f32(math.nan), result)


# ln 2 in two parts, the first with so few bits that its product with an exponent is exact.
_LOG_LN2_HIGH = 0.693145751953125
_LOG_LN2_LOW = math.log(2.0) - _LOG_LN2_HIGH


def log(x: Expr, block: Block) -> Expr:
    f, exponent = _split_log(x, block)
    low = block.let(exponent * f32(_LOG_LN2_LOW) + _log_tail(f, block), "low")
    return _log_specials(x, exponent * f32(_LOG_LN2_HIGH) + (f + low), block)


def _log_base(x: Expr, high: float, low: float, step: float, block: Block) -> Expr:
    """e * step + (f + tail) * (high + low), where `high` has 12 bits: f is split to match."""
    f, exponent = _split_log(x, block)
    tail = _log_tail(f, block)
    top = block.let(bits(bits(f, "int32") & const(-4096, "int32"), "float32"), "top")
    rest = block.let((f - top) + tail, "rest")
    small = block.let(rest * f32(high) + (f + tail) * f32(low), "small")
    step_high = math.ldexp(round(math.ldexp(step, 12)), -12)
    small = block.let(exponent * f32(step - step_high) + small, "small")
    return _log_specials(x, exponent * f32(step_high) + (top * f32(high) + small), block)


def log2(x: Expr, block: Block) -> Expr:
    high = 1.4423828125
    return _log_base(x, high, 1 / math.log(2.0) - high, 1.0, block)


def log10(x: Expr, block: Block) -> Expr:
    high = 0.434326171875
    return _log_base(x, high, 1 / math.log(10.0) - high, math.log10(2.0), block)


def log1p(x: Expr, block: Block) -> Expr:
    """log(u) + ((1 + x) - u) / u with u = 1 + x rounded."""
    u = block.let(x + f32(1.0), "u")
    lost = select(x > f32(1.0), f32(1.0) - (u - x), x - (u - f32(1.0)))
    correction = lost / u
    f, exponent = _split_log(u, block)
    low = exponent * f32(_LOG_LN2_LOW) + (_log_tail(f, block) + correction)
    result = exponent * f32(_LOG_LN2_HIGH) + (f + block.let(low, "low"))
    result = select(tir.eq(u, f32(1.0)), x, result)  # also keeps the sign of zero
    return _log_specials(u, result, block)


def _with_sign(magnitude: Expr, x: Expr) -> Expr:
    sign = bits(x, "uint32") & const(0x80000000, "uint32")
    return bits(bits(magnitude, "uint32") | sign, "float32")


def absolute(x: Expr) -> Expr:
    return bits(bits(x, "uint32") & const(0x7FFFFFFF, "uint32"), "float32")


def tanh(x: Expr, block: Block) -> Expr:
    a = block.let(absolute(x), "a")
    large = f32(1.0) - f32(2.0) / (exp(a + a, block) + f32(1.0))
    square = block.let(a * a, "square")
    small = square * polynomial(square, _TANH, block) * a + a
    magnitude = block.let(select(a < f32(0.625), small, large), "magnitude")
    return _with_sign(magnitude, x)


def sigmoid(x: Expr, block: Block) -> Expr:
    e = block.let(exp(f32(0.0) - absolute(x), block), "e")
    r = block.let(f32(1.0) / (e + f32(1.0)), "r")
    return select(x >= f32(0.0), r, e * r)


def erf(x: Expr, block: Block) -> Expr:
    a = block.let(absolute(x), "a")
    square = block.let(a * a, "square")
    small = polynomial(square, _ERF_SMALL, block) * a + a
    t = block.let(select(a > f32(4.0), f32(4.0), a), "t")
    large = f32(1.0) - exp(f32(0.0) - t * polynomial(t, _ERF_LARGE, block), block)
    magnitude = block.let(select(a < f32(1.0), small, large), "magnitude")
    return _with_sign(magnitude, x)


def gelu(x: Expr, block: Block) -> Expr:
    """x/2 + x/2 erf(x / sqrt 2). The sum hides the last bits of erf, so a coarser one will do."""
    scaled = block.let(x * f32(math.sqrt(0.5)), "scaled")
    square = block.let(scaled * scaled, "square")
    over = block.let(scaled * polynomial(square, _ERF_OVER, block), "over")
    ratio = block.let(over / polynomial(square, _ERF_UNDER, block), "ratio")
    ratio = block.let(select(scaled > f32(_ERF_LIMIT), f32(1.0), ratio), "ratio")
    ratio = block.let(select(scaled < f32(-_ERF_LIMIT), f32(-1.0), ratio), "ratio")
    half = block.let(x * f32(0.5), "half")
    return half * ratio + half


# 2 / pi in binary: 256 bits after the point, 64 a word.
_TWO_OVER_PI = (0xA2F9836E4E441529, 0xFC2757D1F534DDC0, 0xDB6295993C439041, 0xFE5163ABDEBBC561)


def _quadrant(x: Expr, block: Block) -> tuple[Expr, Expr]:
    """r (float64, |r| <= pi/4) and q (int32) with x = q pi/2 + r modulo 2 pi.

    Two ways, both computed: below 2^30 a product and two fused steps in float64; above it x times
    the 96 bits of 2/pi that matter (Payne & Hanek, 1983).
    """
    wide = block.let(cast(x, "float64"), "wide")
    rounder = const(1.5 * 2.0**52, "float64")
    shifted = block.let(wide * const(2 / math.pi, "float64") + rounder, "shifted")
    whole = block.let(shifted - rounder, "whole")
    r = block.let(whole * const(-1.5707963267948966, "float64") + wide, "r")
    r = block.let(whole * const(-6.123233995736766e-17, "float64") + r, "r")
    q = cast(bits(shifted, "int64") & const(3, "int64"), "int32")
    raw = block.let(bits(x, "uint32"), "raw")
    mantissa = (raw & const(0x7FFFFF, "uint32")) | const(0x800000, "uint32")
    mantissa = block.let(cast(mantissa, "uint64"), "mantissa")
    biased = (raw >> const(23, "uint32")) & const(255, "uint32")
    # x = mantissa * 2^(biased - 150); its product with 2/pi needs the bits from place `skip` on.
    skip = block.let(cast(biased, "int32") - const(152, "int32"), "skip")
    skip = block.let(select(skip < const(0, "int32"), const(0, "int32"), skip), "skip")
    words = [const_u64(w) for w in _TWO_OVER_PI]
    far = skip >= const(64, "int32")
    a, b, c = (
        block.let(select(far, words[i + 1], words[i]), f"word{i}") for i in range(3)
    )  # fmt: skip
    shift = block.let(cast(skip & const(63, "int32"), "uint64"), "shift")
    high = block.let(_funnel(a, b, shift), "high")
    low = _funnel(b, c, shift) >> const(32, "uint64")
    turns = block.let(_wrapping_product(mantissa, high, block), "turns")
    turns = block.let(_wrapping_sum(turns, (mantissa * low) >> const(32, "uint64"), block), "turns")
    # turns / 2^62 = quadrants modulo 4; rounding to the nearest one leaves a signed fraction.
    signed = bits(turns, "int64")
    nearest = _wrapping_sum(turns, const_u64(1 << 61), block)
    big_q = cast(nearest >> const(62, "uint64"), "int32")
    fraction = (signed << const(2, "int64")) >> const(2, "int64")
    big_r = cast(fraction, "float64") * const(math.pi / 2 * 2.0**-62, "float64")
    negative = x < f32(0.0)
    big_r = select(negative, const(0.0, "float64") - big_r, big_r)
    big_q = select(negative, const(0, "int32") - big_q, big_q)
    big = block.let(absolute(x) >= f32(2.0**30), "big")
    return block.let(select(big, big_r, r), "r"), block.let(select(big, big_q, q), "q")


def const_u64(value: int) -> Expr:
    """TVM's constants are signed; the same bits as uint64."""
    signed = value - (1 << 64) if value >= 1 << 63 else value
    return bits(const(signed, "int64"), "uint64")


def _funnel(high: Expr, low: Expr, shift: Expr) -> Expr:
    """The upper 64 bits of (high, low) << shift, 0 <= shift < 64."""
    return intrinsic("uint64", "llvm.fshl", high, low, shift)


def _wrapping_product(a: Expr, b: Expr, block: Block) -> Expr:
    """a * b modulo 2^64 for a < 2^24, from halves: LLVM may assume that products do not wrap."""
    low = block.let(a * (b & const_u64(0xFFFFFFFF)), "low")
    high = a * (b >> const(32, "uint64"))
    return _wrapping_sum(low, (high & const_u64(0xFFFFFFFF)) << const(32, "uint64"), block)


def _wrapping_sum(a: Expr, b: Expr, block: Block) -> Expr:
    """a + b modulo 2^64: a sum of 128-bit numbers cannot overflow, and LLVM narrows it again."""
    del block
    return cast(cast(a, "uint128") + cast(b, "uint128"), "uint64")


def _sine(r: Expr, block: Block) -> Expr:
    square = block.let(r * r, "square")
    return square * polynomial(square, _SIN, block) * r + r


def _cosine(r: Expr, block: Block) -> Expr:
    square = block.let(r * r, "square")
    rest = square * square * polynomial(square, _COS, block)
    return rest + (const(1.0, "float64") - const(0.5, "float64") * square)


def _circular(x: Expr, turn: int, block: Block) -> Expr:
    """sin(x + turn * pi/2); NaN for infinities."""
    r, q = _quadrant(x, block)
    q = block.let(q + const(turn, "int32"), "q")
    odd = tir.eq(q & const(1, "int32"), const(1, "int32"))
    value = cast(block.let(select(odd, _cosine(r, block), _sine(r, block)), "value"), "float32")
    flip = (cast(q, "uint32") & const(2, "uint32")) << const(30, "uint32")
    value = bits(bits(block.let(value, "value"), "uint32") ^ flip, "float32")
    finite = absolute(x) < f32(math.inf)
    return select(finite, value, f32(math.nan))


def sin(x: Expr, block: Block) -> Expr:
    return select(tir.eq(x, f32(0.0)), x, _circular(x, 0, block))  # keeps the sign of zero


def cos(x: Expr, block: Block) -> Expr:
    return _circular(x, 1, block)
