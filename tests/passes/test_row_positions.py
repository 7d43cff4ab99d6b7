"""A position for each row: decode equivalence of texts of unequal length, planted mistakes."""

from __future__ import annotations

import pytest
import torch

from accel.errors import ContractError
from accel.ir import Builder, Module, TensorType, verify
from accel.ir.types import symbol
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
