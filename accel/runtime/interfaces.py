"""What the executor asks of vendor libraries and of generated host code.

The executor (`accel.runtime.executor`) knows no library and no code format. It is given

- `Libraries`: name -> `Library`, e.g. `accel.runtime.libraries.get`;
- a `HostCode`, loaded from the artifact's `.so` or straight from a code generator.

Everything slow happens once: `Library.prepare` packs weights, `HostCode.function` finds a symbol.
What is left per call is one Python call per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operand:
    """What is known about an operand of a library step before the first call.

    `shape` has None where a size changes from call to call. `weight` is the tensor itself if the
    operand is a constant; for a sub-byte dtype it is the stored form (uint8, packed rows).
    """

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    weight: Tensor | None = None


# A prepared vendor call. It takes the operands that are neither absent nor weights, in the order of
# the step's inputs (any operand may be a weight, the activations too), and returns one tensor, or a
# sequence of as many as the step has outputs.
# Results are new memory: they alias no operand. Several threads may call it at the same time.
# Operands may have any strides.
LibraryCall: TypeAlias = Callable[..., Any]


def in_place(call: LibraryCall) -> LibraryCall:
    """The same call, writing its result over its first operand; itself if it has no such form.

    An entry whose steps have an option "inplace" gives its call an attribute `in_place`.
    """
    form: LibraryCall = getattr(call, "in_place", call)
    return form


class Library(Protocol):
    """One vendor entry, such as "onednn.linear"."""

    name: str

    def prepare(
        self, options: Mapping[str, Any], operands: Sequence[Operand | None]
    ) -> LibraryCall:
        """Packs weights and returns the call. None is an absent optional operand.

        Called once per distinct (options, weights, operand types), whatever the number of entry
        points and shapes. After it returns, the pages of the operands' weights are given back to
        the system; touching them again is allowed and reads them from the file again.
        Raises ArtifactError for options or operands that do not fit (they come from a file), and
        MissingDependencyError where this machine lacks the library.
        """


# Looks an entry up by name; raises MissingDependencyError if this build has none of that name.
Libraries: TypeAlias = Callable[[str], Library]

# A generated kernel: takes the address of int64 words: pointers of the inputs, pointers of the
# outputs, then the run-time sizes (`Step.dims`). Buffers and weights are 64-byte aligned; a user's
# tensors are aligned to their element size. The memory is valid during the call only.
KernelFunction: TypeAlias = Callable[[int], None]


class HostCode(Protocol):
    """A loaded library of generated kernels."""

    def function(self, symbol: str) -> KernelFunction:
        """The kernel of that name; ArtifactError if there is none."""


# Loads host code from the bytes of a shared object (already checked and trusted).
HostCodeLoader: TypeAlias = Callable[[bytes], HostCode]
