"""Overloads without an effect in a program: assertions that tracing made already, bookkeeping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.frontends.importer import Importer, lower


@lower(
    "_assert_tensor_metadata", "_assert_async", "_assert_async.msg", "_assert_scalar",
    "sym_constrain_range", "sym_constrain_range_for_size", "_functional_assert_async.msg",
    "_functional_sym_constrain_range", "_functional_sym_constrain_range_for_size",
    "_functional_assert_scalar", "is_same_size", "prim::device",
    "sym_size.int", "sym_stride.int", "sym_numel", "sym_storage_offset", "_version",
    "is_contiguous", "size.int", "stride.int", "numel", "storage_offset", "is_floating_point",
    "is_complex", "_has_compatible_shallow_copy_type", "result_type.Tensor",
    "_has_same_storage_numel", "sym_is_contiguous", "_is_zerotensor", "is_conj", "is_neg",
)  # fmt: skip
def nothing(c: Importer, *ignored: Any, **also_ignored: Any) -> None:
    return None


@lower("item", "_local_scalar_dense", "is_nonzero")
def item(c: Importer, x: Tensor) -> None:
    """A tensor's element as a Python number: arithmetic with it stays in the program.

    Sizes and branches that depend on it are refused where they are met.
    """
    number = c.call.result
    if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        c.scalars.numbers[number.node.expr] = c.b.reshape_to(c(x), ())
