"""How a backend tells passes what it can take. Passes see these protocols, never a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from accel.ir.module import Op


class KernelGenerator(Protocol):
    """A backend that generates kernels, as passes see it."""

    name: str

    def supports(self, op: Op) -> str | None:
        """None if a kernel region may hold this op, else the reason why not."""

    def supports_product(self, op: Op) -> str | None:
        """None if a kernel may compute this contraction with its neighbours, else the reason."""

    def supports_neighbour(self, op: Op, neighbour: Op) -> str | None:
        """None if such a kernel may also hold this op, which is no elementwise one: a norm before
        the contraction, a slice of its result."""

    def product_kind(self, op: Op, members: Sequence[Op]) -> tuple[str, str | None]:
        """The kind of kernel that computes a contraction together with `members`, itself included;
        and why a library does better, if it does."""

    def supports_anchor(self, op: Op, kind: str) -> str | None:
        """None if a kernel of this kind may be built around the op, else the reason why not.

        Kinds: "attention", "matmul" (linear), "depthwise" (convolution).
        """

    def matmul_columns(self, op: Op) -> int:
        """Columns of one block of such a linear's weight [blocks, K, columns]."""

    def supports_decoding(self, op: Op) -> str | None:
        """None if such a kernel may decode its weight with this op, else the reason why not."""


class Library(Protocol):
    """A vendor library's entry, as passes see it: which ops one call can take together."""

    name: str

    def match(self, op: Op) -> LibraryMatch | None:
        """The call rooted at this op (a linear, say), its epilogue included; None if none fits."""


@dataclass
class LibraryMatch:
    """Ops that one vendor call computes: `root` first, then the epilogue, in order.

    Results are what others read of the ops, in their order: one, unless the root has several.
    `options` are stored on the `accel.call`. `copies` are conversions of the root's operands that
    the call takes in and others may read as well.
    """

    library: str
    ops: list[Op]
    options: tuple[tuple[str, Any], ...] = ()
    copies: list[Op] = field(default_factory=list)
