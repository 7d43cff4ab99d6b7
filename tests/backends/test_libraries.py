"""Vendor calls with operands that are constants, given at each call, or both."""

from __future__ import annotations

from itertools import product as combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import ArtifactError, ExecutionError, MissingDependencyError
from accel.runtime.interfaces import Operand
from accel.runtime.libraries import get

ROWS, DEPTH, COLUMNS = 5, 24, 16


def operand(tensor: Tensor | None, constant: bool) -> Operand | None:
    if tensor is None:
        return None
    return Operand(tensor.dtype, tuple(tensor.shape), tensor if constant else None)


@pytest.mark.parametrize("binary", ["none", "add"])
@pytest.mark.parametrize("unary", ["none", "relu", "gelu", "swish"])
@pytest.mark.parametrize("constants", list(combinations([True, False], repeat=3)))
def test_onednn_linear(binary: str, unary: str, constants: tuple[bool, bool, bool]) -> None:
    if binary == "add" and unary in ("gelu", "swish"):
        with pytest.raises(ArtifactError, match="no fused add"):
            get("onednn.linear").prepare({"binary": binary, "unary": unary}, [])
        return
    x, weight = torch.randn(2, ROWS, DEPTH), torch.randn(COLUMNS, DEPTH)
    bias, other = torch.randn(COLUMNS), torch.randn(2, ROWS, COLUMNS)
    tensors = [x, weight, bias] + ([other] if binary == "add" else [])
    flags = [False, *constants]
    operands = [operand(t, c) for t, c in zip(tensors, flags)]
    options = {"binary": binary, "unary": unary, "algorithm": "none" if unary == "gelu" else ""}
    call = get("onednn.linear").prepare(options, operands)
    live = [t for t, c in zip(tensors, flags) if not c]
    kept = [t.clone() for t in live]
    got = call(*live)
    assert all(torch.equal(a, b) for a, b in zip(live, kept)), "an operand was written"
    wanted = F.linear(x, weight, bias)
    wanted = wanted + other if binary == "add" else wanted
    activation = {"relu": F.relu, "gelu": F.gelu, "swish": F.silu}.get(unary)
    wanted = wanted if activation is None else activation(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_onednn_linear_without_bias_and_with_a_strided_live_weight() -> None:
    x, weight = torch.randn(3, DEPTH), torch.randn(DEPTH, COLUMNS).t()
    operands = [operand(x, False), operand(weight, False), None]
    call = get("onednn.linear").prepare({}, operands)
    torch.testing.assert_close(call(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_unknown_and_malformed_calls() -> None:
    with pytest.raises(MissingDependencyError, match="no vendor library"):
        get("nothing")
    with pytest.raises(ArtifactError, match="takes x, weight"):
        get("onednn.linear").prepare({}, [operand(torch.randn(3, 4), False)])
    with pytest.raises(ArtifactError, match="unary"):
        get("onednn.linear").prepare({"unary": "cube"}, [])


@pytest.mark.parametrize("bias", [False, True])
def test_experts(bias: bool) -> None:
    """Rows in no order, an expert without rows, strided weights."""
    x, weight = torch.randn(3, 4, DEPTH), torch.randn(5, DEPTH, COLUMNS).transpose(1, 2)
    chosen, own = torch.tensor([[4, 0, 0, 2], [2, 2, 4, 0], [3, 3, 0, 4]]), torch.randn(5, COLUMNS)
    operands = [operand(x, False), operand(weight, False), operand(chosen, False)]
    call = get("experts.linear").prepare({}, [*operands, operand(own if bias else None, True)])
    wanted = torch.einsum("abk,abnk->abn", x, weight[chosen]) + (own[chosen] if bias else 0)
    torch.testing.assert_close(call(x, weight, chosen), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ExecutionError, match="expert 5 of 5"):
        call(x, weight, chosen + 1)
    with pytest.raises(ArtifactError, match=r"experts\.linear takes"):
        get("experts.linear").prepare({}, operands)
