"""The section of docs/benchmarks.md on GPU kernels' numerics, from results/gpu_numerics.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]


def numerics_lines(data: dict[str, Any], table: Table) -> list[str]:
    """Kernels and runs by template; for each Triton and architecture, how many compile."""
    fuzz, tests = data["random_regions"], data["tests"]
    rows = [[name, str(r["kernels"]), str(r["runs"])] for name, r in data["templates"].items()]
    rows.append(["random regions", str(fuzz["kernels"]), str(fuzz["runs"])])
    kernels = sum(int(row[1]) for row in rows)
    runs = sum(int(row[2]) for row in rows)
    rows.append(["**in all**", f"**{kernels}**", f"**{runs}**"])
    compiled = [
        [f"Triton {triton}", *(_cell(made) for made in archs.values())]
        for triton, archs in data["compiled"].items()
    ]
    archs = next(iter(data["compiled"].values()))
    return [
        "## Generated GPU kernels, without a GPU",
        "",
        f"{tests['passed']} tests pass, {tests.get('failed', 0)} fail: every kernel is run by",
        "Triton's interpreter (Gluon's on top of it, with barriers and copies) and compared with",
        "the IR's interpreter in float64 (`benchmarks/gpu_numerics.py`). Kernels are those that",
        "differ in what they compute or in their tile; one is run on inputs of several sizes.",
        "",
        *table(["template", "kernels", "runs"], rows),
        "",
        "The same kernels, compiled to machine code. Those in Gluon use instructions of Hopper.",
        "",
        *table(["", *archs], compiled),
        "",
    ]


def _cell(made: dict[str, Any]) -> str:
    said = [f"{made['compiled']} compile"]
    said += [f"{made['for_hopper']} for Hopper alone"] if made["for_hopper"] else []
    said += [f"{len(made['failed'])} fail"] if made["failed"] else []
    said += [f"{made['not_tried']} not tried"] if made["not_tried"] else []
    return ", ".join(said)
