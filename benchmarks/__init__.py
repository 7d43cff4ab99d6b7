"""Benchmarks: accel beside its peers in one run, outputs checked before anything is timed."""
