"""Greedy text generation from an artifact, by a process that never imports the compiler.

    python examples/generate.py smollm2.accel --new 48 1 4093 198 ...    # token ids of the prompt

Prints one JSON object: the new token ids, seconds, memory, and what was imported. The artifact has
a key/value cache: `accel.package_generator` or `accel compile MODEL --generate 1024` makes such.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import accel

COMPILER = ("accel.ir", "accel.passes", "accel.frontends", "accel.backends", "accel.compiler")


def resident_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(row for row in status.read_text().splitlines() if row.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="greedy text generation from an artifact")
    parser.add_argument("artifact")
    parser.add_argument("ids", type=int, nargs="+", help="token ids of the prompt")
    parser.add_argument("--new", type=int, default=48, help="how many tokens at most")
    parser.add_argument("--stop", type=int, help="token id that ends the text")
    options = parser.parse_args()

    base = resident_bytes("VmRSS")
    start = time.perf_counter()
    program = accel.load(options.artifact)
    load_seconds = time.perf_counter() - start

    program.prepare()
    start = time.perf_counter()
    ids = program.generate(
        torch.tensor([options.ids]), max_new_tokens=options.new, eos_token_id=options.stop
    )
    generate_seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    print(
        json.dumps(
            {
                "tokens": ids[0, len(options.ids) :].tolist(),
                "load_seconds": load_seconds,
                "generate_seconds": generate_seconds,
                "peak_bytes": None if base is None or peak is None else peak - base,
                "compiler_modules": [m for m in sys.modules if m.startswith(COMPILER)],
            }
        )
    )


if __name__ == "__main__":
    main()
