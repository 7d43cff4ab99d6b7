"""Generated CPU kernels: regions of tensor-level ops to machine code, through TVM's TIR and LLVM.

backend     TvmBackend: supports(op), compile(kernels)
phases      which loop nests a region becomes (survey: the notes that this needs)
index       affine index arithmetic; merge: which loops can become one
trace       from a result's element to what it is made of; code: the same, writing TIR
nests       the loops of one phase; accumulate: reductions
scalar      one line an elementwise op; math: exp, tanh, erf, log, sin...; dtypes: storage
kernel      TIR functions of a kernel; shim: its C entry point; toolchain: LLVM and linking
"""

from accel.backends.tvm.backend import CompiledKernels, TvmBackend

__all__ = ["CompiledKernels", "TvmBackend"]
