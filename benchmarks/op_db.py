"""Every operator of `torch.testing`'s op_db through the compiler, against eager PyTorch.

    python -m benchmarks.op_db                   # all, JSON to benchmarks/results/op_db.json
    python -m benchmarks.op_db --only softmax

A sample is *right* (eager's result within its dtype's tolerance, or as near to float64's),
*refused* (by a typed error) or *wrong*; nothing else may happen. Random operators are compared by
shape and dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import accel
from accel import tree
from accel.errors import AccelError

RESULTS = Path(__file__).parent / "results" / "op_db.json"
# Results that eager itself does not repeat: draws, and memory that nobody wrote.
RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "empty", "uniform", "cauchy",
          "exponential", "geometric", "log_normal", "rrelu", "new_empty", "as_strided_partial",
          "fractional_max_pool", "pca_lowrank", "svd_lowrank")  # fmt: skip


def samples(info: Any, dtype: torch.dtype, count: int) -> Iterator[tuple[Callable[..., Any], Any]]:
    """The first samples of an operator that take a tensor, as (function, arguments)."""
    made = info.sample_inputs("cpu", dtype, requires_grad=False)
    for _, sample in zip(range(count), made):
        yield info.op, ((sample.input, *sample.args), sample.kwargs)


def compare(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
            random: bool) -> tuple[str, str]:  # fmt: skip
    """("right" | "refused" | "wrong" | "eager fails", detail) of one sample."""

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, node = tree.flatten((args, kwargs))
        copies = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        again: tuple[tuple[Any, ...], dict[str, Any]] = tree.unflatten(node, copies)
        return again

    try:
        eager_args, eager_kwargs = fresh()
        wanted, _ = tree.flatten(function(*eager_args, **eager_kwargs))
    except AccelError as error:
        return "refused", f"{error.id} {error.what}"
    except Exception as error:
        return "eager fails", f"{type(error).__name__}: {error}"
    try:
        given, named = fresh()
        compiled = accel.compile(function, inputs=given, kwargs=named, options={"cache": False})
        given, named = fresh()
        got, _ = tree.flatten(compiled(*given, **named))
    except AccelError as error:
        return "refused", f"{error.id} {error.what}"
    if len(got) != len(wanted):
        return "wrong", f"{len(got)} results, not {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted)):
        if random:
            if a.shape != b.shape or a.dtype != b.dtype:
                return "wrong", f"{a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
            continue
        try:
            torch.testing.assert_close(a, b, equal_nan=True)
        except AssertionError as error:
            if not as_precise(a, b, i, function, fresh()):
                return "wrong", str(error).splitlines()[0]
    return "right", ""


def as_precise(
    got: Tensor, eager: Tensor, index: int, function: Callable[..., Any], inputs: Any
) -> bool:
    """Whether `got` is at most twice as far from the float64 result as eager's result is."""
    if not got.is_floating_point() or got.shape != eager.shape or got.dtype != eager.dtype:
        return False
    leaves, node = tree.flatten(inputs)
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    args, kwargs = tree.unflatten(node, wide)
    results, _ = tree.flatten(function(*args, **kwargs))
    exact = results[index].double()
    error, allowed = (got - exact).abs().max(), 2 * (eager - exact).abs().max()
    return bool(error <= allowed)


def run(only: str, count: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for info in op_db:
        name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        if only not in name or not info.supports_dtype(dtype, "cpu"):
            continue
        random = any(word in name for word in RANDOM)
        row: dict[str, Any] = {"op": name, "counts": Counter(), "details": []}
        for function, (args, kwargs) in samples(info, dtype, count):
            torch.manual_seed(0)
            try:
                outcome, detail = compare(function, args, kwargs, random)
            except Exception as error:  # anything untyped is a defect, and is reported as one
                outcome, detail = "crashed", f"{type(error).__name__}: {str(error)[:200]}"
            row["counts"][outcome] += 1
            if detail and len(row["details"]) < 2:
                row["details"].append(f"{outcome}: {detail[:200]}")
        rows.append(row)
        bad = {k: v for k, v in row["counts"].items() if k in ("wrong", "crashed")}
        if bad:
            print(name, dict(row["counts"]), *row["details"], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of an operator's name")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.suppress(AttributeError):
        torch.set_num_threads(2)
    rows = run(options.only, options.samples, getattr(torch, options.dtype))
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row["counts"])
    print(f"{len(rows)} operators, samples: {dict(total)}")
    if not options.only:
        RESULTS.parent.mkdir(exist_ok=True)
        summary = {"dtype": options.dtype, "total": dict(total), "rows": rows}
        RESULTS.write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
