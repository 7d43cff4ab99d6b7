"""Vendor libraries, reached through torch: the run-time half of `accel.backends.vendor`.

`get(name)` finds an entry; `prepare` packs weights once and returns the call. Options and operands
come from files, so entries check what they rely on.
"""

from __future__ import annotations

from accel.errors import MissingDependencyError
from accel.runtime.interfaces import Library
from accel.runtime.libraries.cache import CachedAttention, Update
from accel.runtime.libraries.cudnn import CudnnConv
from accel.runtime.libraries.experts import ExpertLinear
from accel.runtime.libraries.flash import FlashAttention
from accel.runtime.libraries.loop import Scan
from accel.runtime.libraries.onednn import OneDnnConv, OneDnnLinear
from accel.runtime.libraries.pages import PagedAttention, UpdatePages
from accel.runtime.libraries.scaled import ScaledLinear
from accel.runtime.libraries.torch_native import ScaledDotProduct, TorchLinear

_ENTRIES: dict[str, Library] = {
    entry.name: entry
    for entry in (
        OneDnnLinear(),
        OneDnnConv(),
        TorchLinear(),
        ExpertLinear(),
        ScaledDotProduct(),
        CudnnConv(),
        CachedAttention(),
        Update(),
        PagedAttention(),
        UpdatePages(),
        Scan(),
        FlashAttention(),
        ScaledLinear(),
    )
}


def get(name: str) -> Library:
    """The entry of this name. Raises MissingDependencyError if this version has none."""
    if name not in _ENTRIES:
        raise MissingDependencyError(
            f"no vendor library named '{name}'",
            advice=f"known: {', '.join(sorted(_ENTRIES))}; the artifact may need a newer accel",
        )
    return _ENTRIES[name]
