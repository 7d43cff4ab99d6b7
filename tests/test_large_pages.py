"""Memory on large pages: asked for, not shared between tensors, and given back."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accel.large_pages import empty_on_large_pages

MEGABYTE = 1 << 20


def flags(tensor: Tensor) -> list[str] | None:
    """What the kernel says of the memory at the tensor's start; None if it is nobody's."""
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(n, 16) for n in part.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return part.split("VmFlags:")[1].split()
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_large_tensors_lie_in_memory_that_asks_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without them")
    found = flags(empty_on_large_pages((MEGABYTE,), torch.float32))
    assert found is not None and "hg" in found
    small = flags(empty_on_large_pages((16,), torch.float32))
    assert small is not None and "hg" not in small


def test_tensors_of_a_chunk_do_not_overlap_and_hold_their_dtype():
    kinds = [torch.float32, torch.int8, torch.bfloat16, torch.float64] * 6
    made = [
        empty_on_large_pages((5, MEGABYTE + 3 * n), dtype).fill_(n) for n, dtype in enumerate(kinds)
    ]
    for n, (tensor, dtype) in enumerate(zip(made, kinds)):
        assert tensor.dtype == dtype and tensor.shape == (5, MEGABYTE + 3 * n)
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == n).all())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_memory_goes_back_with_the_last_tensor():
    gc.collect()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    made = [empty_on_large_pages((32 * MEGABYTE,), torch.float32).fill_(1.0) for _ in range(3)]
    before = resident()
    made.clear()
    assert resident() < before - 256 * MEGABYTE
