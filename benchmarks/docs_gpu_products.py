"""The section of docs/benchmarks.md on products, from benchmarks/results/gpu_products.json."""

from __future__ import annotations

from typing import Any


def product_lines(data: dict[str, Any]) -> list[str]:
    """One row a linear: cuBLAS alone, with PyTorch's kernels for the rest, and one generated."""
    lines = [
        "## GPU, linears beside cuBLAS",
        "",
        f"{data['machine']['gpu']}; torch {data['machine']['packages']['torch']}.",
        "",
        "Microseconds of a call in a CUDA graph whose calls have weights of their own. `F.linear`",
        "is cuBLAS alone; then with what is around it (norm, activation, residual; separate",
        "kernels of PyTorch); accel computes all of it in one kernel. Few rows are bound by memory",
        "(TB/s of the weight), many by arithmetic (TFLOP/s). Where cuBLAS and separate kernels are",
        "as fast, the compiler takes those. For weights of codes (int8, int4, fp8) cuBLAS has the",
        "same weight in 16 bits.",
        "",
        "| linear | F.linear | with the rest | accel, one kernel | rate | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        few = row["kind"] != "matmul"
        rate = (row["bytes"] if few else row["flops"]) / row["accel"] / 1e6
        unit = f"{rate:.2f} TB/s" if few else f"{rate:.0f} TFLOP/s"
        lines.append(
            f"| {row['case']} | {row['linear']:.1f} | {row['linear_and_rest']:.1f} "
            f"| {row['accel']:.1f} | {unit} | {row['error']:.0e} |"
        )
    return [*lines, ""]
