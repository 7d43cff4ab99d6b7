"""Generated GPU kernels: from `accel.kernel` regions to Triton source, cubin and PTX.

    program.py     one phase of a kernel as one Triton program
    emitter.py     elements; scalar.py, reductions.py, dtypes.py: what they are made of
    tiles.py       how large a program's tile is
    kernel.py      a region's launches
    toolchain.py   Triton itself: source -> cubin, on a machine without a GPU too
    backend.py     what passes and the compiler see

Index arithmetic and the plan of phases are shared with the CPU's kernels (`accel.backends.loops`).
"""

from accel.backends.triton.backend import (
    CompiledLaunch,
    CompiledLaunches,
    TritonBackend,
    kernel_fingerprint,
)

__all__ = ["CompiledLaunch", "CompiledLaunches", "TritonBackend", "kernel_fingerprint"]
