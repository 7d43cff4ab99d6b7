"""Backends: `tvm` generates CPU kernels; `vendor` says which ops a library call can take."""
