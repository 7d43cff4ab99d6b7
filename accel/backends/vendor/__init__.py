"""Vendor libraries for the CPU, reached through torch: what one call can compute.

Each class here is the compile-time half of an entry in `accel.runtime.libraries`: `match` finds a
root op and as much of its epilogue as the call can take, and the options it returns are what the
run-time half needs. Meaning is never encoded here: it is the region of the `accel.call`.
"""

from accel.backends.vendor.attention import CachedAttention, CudaAttention, ScaledDotProduct, Update
from accel.backends.vendor.cudnn import CudnnConv
from accel.backends.vendor.flash import FlashAttention
from accel.backends.vendor.onednn import ExpertLinear, OneDnnConv, OneDnnLinear, TorchLinear
from accel.backends.vendor.pages import PagedAttention, UpdatePages
from accel.backends.vendor.scaled import ScaledLinear

__all__ = [
    "CachedAttention",
    "CudaAttention",
    "CudnnConv",
    "ExpertLinear",
    "FlashAttention",
    "OneDnnConv",
    "OneDnnLinear",
    "PagedAttention",
    "ScaledDotProduct",
    "ScaledLinear",
    "TorchLinear",
    "Update",
    "UpdatePages",
]
