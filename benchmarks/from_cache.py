"""Seconds until accel is ready in a new process that finds its kernels in the cache.

    python -m benchmarks.from_cache 8b_prefill

prints them. The process has imported everything and holds the model's weights on the GPU; what is
timed is what `benchmarks.gpu_decode` calls ready: captured, compiled from the cache, and called.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch


def from_cache(row: str) -> float:
    """Runs this file on a row of `benchmarks.gpu_decode`; the caches are those of this process."""
    command = [sys.executable, "-m", "benchmarks.from_cache", row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row} from the cache: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def main() -> None:
    from benchmarks import gpu_decode

    compile_one = gpu_decode.ready(sys.argv[1])
    torch.cuda.synchronize()
    start = time.perf_counter()
    compile_one("accel")
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
