"""page_cache: decode equivalence with pages in any order, planted mistakes, refusals, sharing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from accel.errors import ContractError, OptionError
from accel.ir import Builder, Module, interpret, verify
from accel.ir.module import Op
from accel.passes.cache_kinds import cache_passes
from accel.passes.equivalence import TOLERANCE, check_decode
from accel.passes.manager import run_pipeline
from tests.passes.causal_models import captured, tiny

pytest.importorskip("transformers")

CAPACITY = 12


def paged(
    family: str,
    before: str = "",
    options: str = "page=4",
    extend: int = 0,
    unequal: bool = False,
    batch: int = 0,
) -> Module:
    module = captured(tiny(family))
    rows = f"unequal={str(unequal).lower()},batch={batch}"
    insert = f"insert_kv_cache{{capacity={CAPACITY},extend={extend},rings=false,{rows}}}"
    run_pipeline(module, f"{before}{insert},page_cache{{{options}}}")
    verify(module)
    return module


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "gpt2", "gemma3"])
def test_decode_equivalence(family: str) -> None:
    """Pages of every run lie in another order; @extend crosses their bounds."""
    module = paged(family, extend=3)
    assert check_decode(module, prompts=(1, 3, 4), batches=(1, 2), steps=2) <= TOLERANCE


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_codes_have_pages(form: str) -> None:
    module = paged("llama", f"quantize_cache{{format={form}}},")
    decode = module.functions["decode"]
    assert sum(op.name == "gather_pages" for op in decode.ops) > 4
    assert check_decode(module, prompts=(3,), batches=(2,), steps=2) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "gpt2", "gemma3"])
def test_rows_of_unequal_length_decode_as_they_would_alone(family: str) -> None:
    """To the last position of the cache, beside rows that stand before other pages' ends."""
    module = paged(family, options="page=4", unequal=True)
    decode = module.functions["decode"]
    assert module.metadata["kv_cache"]["unequal"]
    rows = decode.args[0].shape[:1]
    assert all(op.operands[3].shape == rows for op in _ops(module, "update_pages"))
    assert all(op.operands[4].shape == rows for op in _ops(module, "paged_attention"))
    allowed = 1e-6 if family == "mixtral_grouped" else TOLERANCE
    assert check_decode(module, prompts=(5,), batches=(3,), steps=3) <= allowed


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_codes_of_rows_of_unequal_length(form: str) -> None:
    module = paged("llama", f"quantize_cache{{format={form}}},", unequal=True)
    assert check_decode(module, prompts=(5,), batches=(2,), steps=2) <= TOLERANCE


@pytest.mark.parametrize(("batch", "page"), [(2, 1), (3, 3), (5, 12)])
def test_a_fixed_number_of_rows_of_unequal_length(batch: int, page: int) -> None:
    module = paged("llama", options=f"page={page}", unequal=True, batch=batch)
    assert all(f.args[0].shape[0] == batch for n, f in module.functions.items() if n != "main")
    assert check_decode(module, prompts=(2, 5), steps=2) <= TOLERANCE


@pytest.mark.parametrize("page", [1, 3, 12])
def test_sizes_of_pages(page: int) -> None:
    module = paged("llama", options=f"page={page}")
    facts = module.metadata["kv_cache"]["paged"]
    assert facts == {"page": page, "bytes": 4 * 2 * page * 16 * 4, "pages": 0}
    assert check_decode(module, prompts=(2,), batches=(2,), steps=2) <= TOLERANCE


def test_the_manager_checks_the_contract():
    module = captured(tiny("llama"))
    pipeline = f"insert_kv_cache{{capacity={CAPACITY}}},page_cache{{page=4}}"
    row = run_pipeline(module, pipeline, validate=True).rows[1]
    assert row.changed and 0 < row.error <= TOLERANCE


def test_texts_that_share_pages_read_the_same():
    """The second text's table names the first one's pages; nothing of its own is written there."""
    module = paged("llama")
    decode, generator = module.functions["decode"], torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (2, 10), generator=generator)
    ids[1, :8] = ids[0, :8]
    pools = [torch.zeros(7, *map(int, a.shape[1:])).double() for a in decode.args[3:]]
    table = torch.tensor([[4, 2, 6], [4, 2, 1]], dtype=torch.int32)

    def run(name: str, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return interpret(module.functions[name], given, module.weights, oracle=True)

    _, *pools = run("prefill", [ids[:1, :8], table[:1], *pools])
    for n in (8, 9):
        logits, *pools = run("decode", [ids[:, n : n + 1], torch.tensor(n), table, *pools])
    empty = [torch.zeros_like(p) for p in pools]
    apart = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    wanted, *_ = run("prefill", [ids, apart, *empty])
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)


# -- planted mistakes ----------------------------------------------------------------------------


def _ops(module: Module, name: str) -> list[Op]:
    return [op for op in module.functions["decode"].ops if op.name == name]


def _turned(op: Op, index: int) -> None:
    """The table with its columns moved on by one."""
    b, table = Builder(before=op), op.operands[index]
    columns = int(table.shape[1])
    first = b.slice(table, axis=1, start=0, stop=1)
    rest = b.slice(table, axis=1, start=1, stop=columns)
    op.set_operand(index, b.cat(rest, first, axis=1))


def write_to_the_wrong_page(module: Module) -> None:
    _turned(_ops(module, "update_pages")[0], 2)


def read_the_wrong_page(module: Module) -> None:
    _turned(_ops(module, "paged_attention")[0], 3)


def write_one_slot_late(module: Module) -> None:
    op = _ops(module, "update_pages")[1]
    b = Builder(before=op)
    slots = b.scalar(CAPACITY, torch.int64)
    op.set_operand(3, b.remainder(b.add(op.operands[3], b.scalar(1, torch.int64)), slots))


def see_one_token_too_few(module: Module) -> None:
    op = _ops(module, "paged_attention")[0]
    b = Builder(before=op)
    op.set_operand(4, b.sub(op.operands[4], b.scalar(1, torch.int64)))


@pytest.mark.parametrize(
    "plant",
    [write_to_the_wrong_page, read_the_wrong_page, write_one_slot_late, see_one_token_too_few],
)
def test_planted_mistakes_are_caught(plant: Callable[[Module], None]) -> None:
    module = paged("llama")
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(3,), batches=(2,), steps=2)


def _of_rows(op: Op, index: int, order: tuple[int, ...]) -> None:
    """An operand's rows in another order."""
    b, value = Builder(before=op), op.operands[index]
    rows = [b.slice(value, axis=0, start=r, stop=r + 1) for r in order]
    op.set_operand(index, b.cat(*rows, axis=0))


def one_row_writes_a_slot_late(module: Module) -> None:
    op = _ops(module, "update_pages")[0]
    b, at = Builder(before=op), op.operands[3]
    last = b.iota(shape=tuple(at.shape), axis=0, dtype=torch.int64)
    late = b.add(at, b.floor_div(last, b.scalar(2, torch.int64)))
    op.set_operand(3, b.remainder(late, b.scalar(CAPACITY, torch.int64)))


def one_row_sees_a_token_too_few(module: Module) -> None:
    op = _ops(module, "paged_attention")[0]
    b, at = Builder(before=op), op.operands[4]
    last = b.iota(shape=tuple(at.shape), axis=0, dtype=torch.int64)
    op.set_operand(4, b.sub(at, b.floor_div(last, b.scalar(2, torch.int64))))


def rows_see_as_far_as_others(module: Module) -> None:
    _of_rows(_ops(module, "paged_attention")[0], 4, (1, 0, 2))


def rows_write_to_the_pages_of_others(module: Module) -> None:
    _of_rows(_ops(module, "update_pages")[1], 2, (1, 0, 2))


def rows_read_the_pages_of_others(module: Module) -> None:
    _of_rows(_ops(module, "paged_attention")[0], 3, (1, 0, 2))


@pytest.mark.parametrize(
    "plant",
    [
        one_row_writes_a_slot_late,
        one_row_sees_a_token_too_few,
        rows_see_as_far_as_others,
        rows_write_to_the_pages_of_others,
        rows_read_the_pages_of_others,
    ],
)
def test_planted_mistakes_in_one_row_are_caught(plant: Callable[[Module], None]) -> None:
    module = paged("llama", unequal=True, batch=3)
    plant(module)
    verify(module)
    with pytest.raises(ContractError, match="decode equivalence"):
        check_decode(module, prompts=(5,), steps=2)


# -- refusals ------------------------------------------------------------------------------------


def test_rings_have_no_pages():
    module = captured(tiny("mistral"))
    with pytest.raises(OptionError, match="ring") as caught:
        run_pipeline(module, f"insert_kv_cache{{capacity={CAPACITY}}},page_cache{{page=4}}")
    assert "rings=false" in caught.value.advice


def test_recurrent_state_has_no_pages():
    module = paged("llama")
    module.metadata["kv_cache"]["state"].append({"name": "sum.0", "kind": "sum", "axis": 1})
    with pytest.raises(OptionError, match="not kept token by token"):
        run_pipeline(module, "page_cache{page=4}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("page=5", "no multiple"),
        ("page=0", "page = 0"),
        ("page=4,pages=3,memory=10", "contradict"),
        ("page=4,memory=10", "takes 2048 bytes"),
    ],
)
def test_wrong_options(options: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        paged("llama", options=options)


def test_there_must_be_a_cache():
    with pytest.raises(OptionError, match="no cache yet"):
        run_pipeline(captured(tiny("llama")), "page_cache")


def test_memory_says_how_many_pages():
    module = paged("llama", options="page=4,memory=10000")
    assert module.metadata["kv_cache"]["paged"]["pages"] == 4


def test_kinds_by_name():
    before, after = cache_passes("int4,page_cache{page=32,pages=9}")
    assert [p.name for p in before] == ["quantize_cache"] and after[0].options()["pages"] == 9
    assert cache_passes("") == ([], [])
    for wrong in ("int5", "int8,int4", "paged,page_cache"):
        with pytest.raises(OptionError):
            cache_passes(wrong)
