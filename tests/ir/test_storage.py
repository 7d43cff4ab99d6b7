"""Sub-byte packing is exact for every dtype and size; weight stores share and name tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.errors import VerifyError
from accel.ir import TensorType, WeightStore
from accel.ir.storage import pack_sub_byte, tensor_digest, unpack_sub_byte
from accel.ir.types import SUB_BYTE_BITS, value_dtype

SUB_BYTE = sorted(SUB_BYTE_BITS, key=str)


def bounds(dtype: torch.dtype) -> tuple[int, int]:
    bits = SUB_BYTE_BITS[dtype]
    if value_dtype(dtype) == torch.uint8:
        return 0, (1 << bits) - 1
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def reference_bytes(row: list[int], bits: int) -> list[int]:
    """Element i in bits i * bits and up of the row, lowest bit first, whole bytes."""
    number = sum((value & ((1 << bits) - 1)) << (i * bits) for i, value in enumerate(row))
    return list(number.to_bytes((len(row) * bits + 7) // 8, "little"))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(SUB_BYTE),
    shape=st.lists(st.integers(0, 11), min_size=0, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_is_exact_and_little_endian(
    dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    low, high = bounds(dtype)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high + 1, shape, generator=generator).to(value_dtype(dtype))
    packed = pack_sub_byte(values, dtype)
    assert packed.dtype == torch.uint8
    assert packed.numel() == TensorType(tuple(shape), dtype).nbytes()
    rows = values.reshape(-1, shape[-1]) if shape and values.numel() else values.reshape(1, -1)
    wanted = [b for row in rows.tolist() for b in reference_bytes(row, SUB_BYTE_BITS[dtype])]
    assert packed.reshape(-1).tolist() == wanted
    back = unpack_sub_byte(packed, dtype, tuple(shape))
    assert back.dtype == values.dtype and torch.equal(back, values)


@pytest.mark.parametrize("dtype", SUB_BYTE, ids=str)
def test_every_value_survives(dtype: torch.dtype) -> None:
    low, high = bounds(dtype)
    values = torch.arange(low, high + 1, dtype=torch.int16)
    back = unpack_sub_byte(pack_sub_byte(values, dtype), dtype, tuple(values.shape))
    assert back.tolist() == values.tolist()
    for outside in (low - 1, high + 1):
        with pytest.raises(VerifyError, match="do not fit"):
            pack_sub_byte(torch.tensor([outside], dtype=torch.int16), dtype)


def test_values_that_are_not_contiguous() -> None:
    values = torch.randint(-8, 8, (5, 7), dtype=torch.int8).t()
    back = unpack_sub_byte(pack_sub_byte(values, torch.int4), torch.int4, (7, 5))
    assert torch.equal(back, values)


def test_packing_refuses_what_is_not_integer() -> None:
    with pytest.raises(VerifyError, match="not integers"):
        pack_sub_byte(torch.tensor([1.5]), torch.int4)


def test_unpacking_refuses_another_size() -> None:
    packed = pack_sub_byte(torch.zeros(2, 6, dtype=torch.int8), torch.int4)
    with pytest.raises(VerifyError, match="bytes"):
        unpack_sub_byte(packed, torch.int4, (2, 8))
    with pytest.raises(VerifyError, match="bytes"):
        unpack_sub_byte(packed, torch.int4, (3, 6))


def test_names_are_unique_and_tensors_shared() -> None:
    store = WeightStore()
    x = torch.rand(3)
    assert [store.add("w", x), store.add("w", x), store.add("w", x)] == ["w", "w_1", "w_2"]
    assert store.tensor("w_1").data_ptr() == x.data_ptr()
    copy = store.copy()
    copy.remove("w")
    assert "w" in store and "w" not in copy and len(copy) == 2
    with pytest.raises(VerifyError, match="no weight named 'w'"):
        copy.tensor("w")


def test_lazy_weights_are_loaded_when_asked_for() -> None:
    loads = []

    def load() -> torch.Tensor:
        loads.append(1)
        return torch.ones(2)

    store = WeightStore()
    store.add_lazy("w", TensorType((2,), torch.float32), load, origin="model.w")
    assert (store.type("w"), store.origin("w"), store.nbytes(), loads) == (
        TensorType((2,), torch.float32), "model.w", 8, [],
    )  # fmt: skip
    assert store.tensor("w").sum() == 2 and loads == [1]


def test_digests_tell_content_dtype_and_shape_apart() -> None:
    store = WeightStore()
    x = torch.arange(6.0)
    names = [
        store.add("a", x),
        store.add("b", x.clone()),
        store.add("shape", x.reshape(2, 3)),
        store.add("bits", x.view(torch.int32)),
        store.add("other", x + 1),
        store.add("strided", torch.arange(12.0)[::2] / 2),
        store.add("zero", torch.tensor([0.0])),
        store.add("negative zero", torch.tensor([-0.0])),
        store.add_sub_byte("four", torch.arange(6), torch.uint4),
    ]
    digests = [store.digest(n) for n in names]
    assert digests[0] == digests[1] == digests[5]
    assert len(set(digests)) == len(digests) - 2
    assert tensor_digest(torch.zeros(0)) == tensor_digest(torch.zeros(0))
