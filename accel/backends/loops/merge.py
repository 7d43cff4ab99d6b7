"""Which neighbouring loops can become one.

Axes a, b with extents m, n merge into one loop of m * n steps if every address that uses them moves
n times as far in a as in b. A dense elementwise kernel over any number of axes thus becomes one
loop. An axis whose value is used as a number (a mask, say) keeps a loop of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accel.backends.loops.index import Affine, Axis
from accel.ir.types import Dim, product, same_dim


def merged(
    axes: Sequence[Axis], addresses: Iterable[Affine], fixed: set[Axis]
) -> list[tuple[Axis, ...]]:
    """Groups of axes that share a loop, in order."""
    addresses = list(addresses)
    groups: list[tuple[Axis, ...]] = []
    for axis in axes:
        if groups and _mergeable(groups[-1], axis, addresses, fixed):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return groups


def _mergeable(
    group: tuple[Axis, ...], axis: Axis, addresses: list[Affine], fixed: set[Axis]
) -> bool:
    last = group[-1]
    if last in fixed or axis in fixed:
        return False
    for address in addresses:
        far, near = address.coefficient(last), address.coefficient(axis)
        if far is None or near is None or not same_dim(far, _times(near, axis.extent)):
            return False
    return True


def _times(a: Dim, b: Dim) -> Dim:
    return product((a, b))


def group_extent(group: Sequence[Axis]) -> Dim:
    return product(a.extent for a in group)
