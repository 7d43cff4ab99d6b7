"""Bad IR text: typed errors with line, column and a caret, whatever the damage."""

from __future__ import annotations

import random
import re
import time

import pytest

from accel.errors import AccelError, IRParseError
from accel.ir import definitions, parse_module, print_module
from accel.ir.expr import parse_expr
from tests.ir.random_program import random_program

GOOD = """
"accel.func"() ({
^bb0(%x: tensor<4xf32>):
  %y = "accel.softmax"(%x) {axis = 0} : (tensor<4xf32>) -> tensor<4xf32>
  "accel.return"(%y) : (tensor<4xf32>) -> ()
}) {sym_name = "main"} : () -> ()
"""


def test_the_text_is_good() -> None:
    assert parse_module(GOOD).main.body.size == 2


def test_an_error_points_at_its_place() -> None:
    with pytest.raises(IRParseError) as error:
        parse_module(GOOD.replace("(%x)", "(%z)"), "model.mlir")
    where = error.value.where.splitlines()
    assert where[0] == "model.mlir:4:24"
    assert where[1][where[2].index("^") :].startswith("%z")


def test_long_lines_are_cut_around_the_caret() -> None:
    with pytest.raises(IRParseError) as error:
        parse_module(GOOD.replace("{axis = 0}", f"{{axis = 0, {' ' * 500} !}}"))
    _, line, caret = error.value.where.splitlines()
    assert len(line) <= 100 and line[caret.index("^")] == "!"


# What to replace, by what, and what the error says.
BROKEN = [
    ("(%x)", "(%z)", "%z is not defined before its use"),
    ("%y = ", "%x = ", "%x is defined twice"),
    ("accel.softmax", "accel.softmaxx", "unknown op"),
    ("accel.softmax", "torch.softmax", "unknown op"),
    ("{axis = 0}", "{axis = 0, axis = 1}", "'axis' is given twice"),
    ("{axis = 0}", "{axis = }", "cannot read the attribute '}'"),
    ("{axis = 0}", "{axis 0}", "expected ','"),
    ("{axis = 0}", "{0 = 0}", "expected an attribute name"),
    ("{axis = 0}", "{axis = 0", r"expected a type, found '\('"),
    ("{axis = 0}", "{axis = 99999999999999999999}", "does not fit 64 bits"),
    ("{axis = 0}", "{axis = " + "9" * 5000 + "}", "too many digits"),
    ("{axis = 0}", "{axis = " + "9" * 390 + ".0}", "does not fit a double"),
    ("{axis = 0}", "{axis = 0xFFFFFFFFFFFFFFFFFF : f64}", "does not fit 64 bits"),
    ("{axis = 0}", "{axis = 1.0 : i64}", r"1\.0 is no i64"),
    ("{axis = 0}", "{axis = 1 : i7}", "a number of type 'i7'"),
    ("{axis = 0}", "{axis = " + "[" * 2000 + "}", "nest deeper"),
    ("{axis = 0}", '{axis = #accel.expr<"n +">}', "expected 'a term'"),
    ("{axis = 0}", '{axis = #accel.expr<"9**9**9">}', "exponent"),
    ("{axis = 0}", '{axis = #accel.complex<"1">}', "no complex number"),
    ("{axis = 0}", '{axis = #other.thing<"1">}', "unknown attribute #other"),
    ("{axis = 0}", '{axis = "\\zz"}', "unknown escape"),
    ("{axis = 0}", '{axis = "\\FF"}', "not UTF-8"),
    ("{axis = 0}", '{axis = 0, accel.dims = [#accel.expr<"n">]}', "more sizes"),
    ("{axis = 0}", "{axis = 0, accel.dims = 4}", "not a list of sizes"),
    ("{axis = 0}", "{axis = 0, operand_segments = [1]}", "has no operand_segments"),
    ("-> tensor<4xf32>\n", "-> tensor<?xf32>\n", "one size for each"),
    ("-> tensor<4xf32>\n", "-> tensor<4xf33>\n", "unknown element type 'f33'"),
    ("-> tensor<4xf32>\n", "-> tensor<-4xf32>\n", "unknown element type '-4xf32'"),
    ("-> tensor<4xf32>\n", "-> tensor<" + "9" * 30 + "xf32>\n", "unknown element type"),
    ("-> tensor<4xf32>\n", "-> tensor<4xf32\n", "unknown element type|does not end"),
    ("-> tensor<4xf32>\n", "-> (tensor<4xf32>, tensor<4xf32>)\n", "1 names for 2 results"),
    (": (tensor<4xf32>) -> tensor", ": (tensor<5xf32>) -> tensor", "operand types do not match"),
    ('sym_name = "main"', "sym_name = 3", "'sym_name' is malformed"),
    ('{sym_name = "main"}', "", "'sym_name' is malformed"),
    ('"main"}', '"main", colour = 1}', "unknown attribute 'colour'"),
    ('"main"}', '"main", symbols = [["n", 2]]}', "'symbols' is malformed"),
    ('"main"}', '"main", symbols = [["n", 2, 3], ["n", 2, 3]]}', "'symbols' is malformed"),
    ('"main"}', '"main", donates = [[0, "x"]]}', "'donates' is malformed"),
    ('"main"}', '"main", metadata = "{"}', "not JSON"),
    ('"main"}', '"main", metadata = "[]"}', "not a JSON object"),
    ('"main"}', '"main", metadata = "' + "[" * 100000 + '"}', "not JSON"),
    ("\n}) {", "\n}) {", ""),
    ("tensor<4xf32>):", "tensor<4xf32>)", "expected ':'"),
    ("^bb0(%x", "^bb0(%x: tensor<4xf32>, %x", "%x is defined twice"),
    ("\n", "\n\x00", r"unexpected character '\\x00'"),
    ('"accel.return"', '"accel.return', "expected an op|unexpected character"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_broken_text(old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if not message:
        parse_module(text)
        return
    with pytest.raises(IRParseError, match=message) as error:
        parse_module(text)
    assert error.value.where.splitlines()[-1].strip() == "^"


def test_two_functions_of_one_name() -> None:
    with pytest.raises(IRParseError, match="@main is defined twice"):
        parse_module(GOOD + GOOD)


def test_locations_that_nest_too_deep() -> None:
    place = '"a"(' * 3000 + "unknown" + ")" * 3000
    with pytest.raises(IRParseError, match="nest deeper"):
        parse_module(GOOD.replace("-> tensor<4xf32>\n", f"-> tensor<4xf32> loc({place})\n"))


def test_regions_that_nest_too_deep() -> None:
    opened = '"accel.kernel"() ({' * 3000
    with pytest.raises(IRParseError, match="nest deeper"):
        parse_module(GOOD.replace('"accel.return"', opened + '"accel.return"'))


@pytest.mark.parametrize(
    "text",
    ["", "n +", "(n", "n)", "1.5", "n n", "f(n)", "Max()", "floor(n, 2)", "Mod(n, 0)", "1 / 0",
     "n // 0", "1 / 2", "9 ** 9 ** 9", "n ** m", "n ** -1", "2 ** 100", "9" * 50, "(" * 500,
     "-" * 500 + "n", "+".join("abcdefgh" * 100), "(a+b+c+d+e+f)**16", "((a+b)**9)**9", "a" * 99,
     "__import__('os')", "n.x", "sqrt(-1)", "é"],
)  # fmt: skip
def test_bad_size_expressions(text: str) -> None:
    start = time.process_time()
    with pytest.raises(IRParseError):
        parse_expr(text)
    assert time.process_time() - start < 5


PIECES = ("{", "}", "(", ")", "<", ">", "[", "]", ",", "=", ":", '"', "%0", "%x", "^bb1", "->",
          "tensor", "?", "9999999999999999999999", "-1", "0x", "unit", "loc(", "#accel.expr<",
          "\\", "\x00", "é", "accel.dims", '"accel.func"', "f32", "nan", "1.0e99999", "//",
          "\n")  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    """A few characters or pieces removed, doubled, swapped or put in; or the end cut off."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        to = min(len(text), at + draw.randint(1, 8))
        kind = draw.randrange(5)
        if kind == 0:
            text = text[:at] + text[to:]
        elif kind == 1:
            text = text[:at] + draw.choice(PIECES) + text[at:]
        elif kind == 2:
            text = text[:at] + draw.choice(PIECES) + text[to:]
        elif kind == 3:
            other = draw.randrange(len(text) + 1)
            text = text[:at] + text[other : other + draw.randint(1, 40)] + text[at:]
        else:
            text = text[: max(at, 1)]
    return text


NUMBERS = ("0", "1", "-1", "2", "7", "-9223372036854775808", "9223372036854775807", "1.5", "true")
TYPES = ("f32", "f16", "i64", "i1", "ui4", "f8E4M3FN", "complex<f32>", "f64")


def other_values(text: str, draw: random.Random) -> str:
    """Numbers, element types and op names changed: text that reads well and is mostly wrong."""
    for _ in range(draw.randint(1, 3)):
        found = list(re.finditer(r"-?\b[0-9]+\b|f32|i64|i1|accel\.\w+", text))
        match = draw.choice(found)
        if match.group().startswith("accel."):
            new = f"accel.{draw.choice(NAMES)}"
        else:
            new = draw.choice(TYPES if match.group() in ("f32", "i64", "i1") else NUMBERS)
        text = text[: match.start()] + new + text[match.end() :]
    return text


NAMES = sorted(d.name for d in definitions())


@pytest.mark.parametrize("seed", range(6))
def test_wrong_values_give_typed_errors_or_a_valid_program(seed: int) -> None:
    draw = random.Random(seed)
    good = print_module(random_program(seed, symbolic=bool(seed % 2), length=6).module)
    refused = 0
    for _ in range(100):
        text = other_values(good, draw)
        start = time.process_time()
        try:
            again = print_module(parse_module(text))
            assert print_module(parse_module(again)) == again
        except AccelError as error:
            refused += 1
            assert error.where, text
        assert time.process_time() - start < 5, text
    assert refused > 50


@pytest.mark.parametrize("seed", range(6))
def test_damaged_text_gives_typed_errors_or_a_valid_program(seed: int) -> None:
    draw = random.Random(seed)
    good = print_module(random_program(seed, symbolic=bool(seed % 2), length=6).module)
    refused = 0
    for _ in range(120):
        text = mutated(good, draw)
        start = time.process_time()
        try:
            module = parse_module(text)
        except AccelError as error:
            refused += 1
            assert error.where, text
        else:
            again = print_module(module)
            assert print_module(parse_module(again)) == again
        assert time.process_time() - start < 5, text
    assert refused > 60


def test_every_truncation_is_refused() -> None:
    good = print_module(random_program(1, symbolic=True, length=3).module).rstrip()
    for end in range(len(good)):
        with pytest.raises(AccelError):
            parse_module(good[:end])
