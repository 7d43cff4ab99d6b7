"""A position for each row: decode equivalence of texts of unequal length, planted mistakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from accel.errors import ContractError
from accel.ir import Builder, Module, verify
from accel.ir.module import Op, Value
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.manager import run_pipeline
from tests.passes.causal_models import FAMILIES, captured, tiny

pytest.importorskip("transformers")

CAPACITY = 12  # more than the sliding windows


def unequal(family: str, options: str = "") -> Module:
    module = captured(tiny(family))
    run_pipeline(module, f"insert_kv_cache{{capacity={CAPACITY},unequal=true{options}}}")
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unequal_length_decode_as_they_would_alone(family: str) -> None:
    module = unequal(family)
    facts = module.metadata["kv_cache"]
    assert facts["unequal"] and all(item["rows"] == 0 for item in facts["state"])
    assert module.functions["decode"].args[1].shape == module.functions["decode"].args[0].shape[:1]
    allowed = 1e-6 if family == "mixtral_grouped" else TOLERANCE
    assert check_decode(module, prompts=(5,), batches=(3,), steps=2) <= allowed


def test_a_fixed_number_of_rows() -> None:
    module = unequal("gpt2", ",batch=3")
    assert all(f.args[0].shape[0] == 3 for n, f in module.functions.items() if n != "main")
    assert module.functions["decode"].args[0].type.is_static
    assert check_decode(module, prompts=(5,), steps=2) <= TOLERANCE


def _first_rows(op: Op, value: Value) -> Value:
    """The first row's entry for all rows."""
    b = Builder(before=op)
    return b.broadcast_to(b.slice(value, axis=0, start=0, stop=1), shape=value.shape)


def all_write_where_the_first_row_does(module: Module) -> None:
    op = next(op for op in module.functions["decode"].ops if op.name == "dynamic_update")
    op.set_operand(2, _first_rows(op, op.operands[2]))


def all_see_what_the_first_row_sees(module: Module) -> None:
    op = next(op for op in module.functions["decode"].ops if op.name == "cached_attention")
    op.set_operand(3, _first_rows(op, op.operands[3]))


def all_turn_by_the_first_rows_angle(module: Module) -> None:
    op = next(op for op in module.functions["decode"].ops if op.name == "rope")
    op.set_operand(1, _first_rows(op, op.operands[1]))


@pytest.mark.parametrize(
    "plant",
    [
        all_write_where_the_first_row_does,
        all_see_what_the_first_row_sees,
        all_turn_by_the_first_rows_angle,
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_planted_mistakes_are_caught(family: str, plant: Callable[[Module], None]) -> None:
    module = unequal(family)
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="beside rows at"):
        check_decode(module, prompts=(5,), batches=(3,), steps=2)


def test_what_has_no_form_for_rows_is_a_near_miss() -> None:
    """A running sum of what depends on the position: @decode takes one position."""
    module = captured(tiny("llama"))
    position = next(op for op in module.main.ops if op.name == "cos").result
    assert position.op is not None and position.op.next is not None
    b = Builder(before=position.op.next)
    ordered = b.cumsum(position, axis=len(position.shape) - 1)
    for user in [u for u in position.users if u is not ordered.op]:
        user.set_operand(list(user.operands).index(position), ordered)
    run_pipeline(module, f"insert_kv_cache{{capacity={CAPACITY},unequal=true}}")
    assert module.metadata["kv_cache"]["unequal"] is False
    assert module.functions["decode"].args[1].shape == ()
    assert check_decode(module, prompts=(5,), batches=(3,), steps=2) <= TOLERANCE
