"""Every operator of `torch.testing`'s op_db through the compiler, against eager PyTorch.

    python -m benchmarks.op_db                       # float32, goes on where a run ended
    python -m benchmarks.op_db --dtype int64 --samples 1
    python -m benchmarks.op_db --only softmax        # prints, stores nothing

Outcomes of a sample:

    right        eager's results and writes to its inputs, within the dtype's tolerance, or as near
                 to float64's as can be expected (`as_precise`); all by ops that the IR defines
    right, torch the same, but torch runs an operator without a definition, which the report lists
    refused      a typed error
    eager fails  PyTorch does not take the sample either

and two that are defects: *wrong* and *crashed* (an untyped error). Operators whose results eager
does not repeat under another seed are compared by shape and dtype. `benchmarks/results/op_db.json`
is written after each operator.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import accel
from accel import tree
from accel.errors import AccelError
from benchmarks.measure import THREADS, load_results, machine, store_results

_FALLBACK = re.compile(r'"accel\.aten"[^\n]*?\bname = "([^"]+)"')
DEFECTS = ("wrong", "crashed")
# Memory that nobody wrote: eager may repeat it by chance.
UNWRITTEN = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty",
             "new_empty_strided", "resize_", "resize_as_")  # fmt: skip
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def samples(info: Any, dtype: torch.dtype, count: int) -> Iterator[tuple[Callable[..., Any], Any]]:
    """The first samples of an operator that take a tensor, as (function, arguments)."""
    made = info.sample_inputs("cpu", dtype, requires_grad=False)
    for _, sample in zip(range(count), made):
        yield info.op, ((sample.input, *sample.args), sample.kwargs)


def judge(function: Callable[..., Any], inputs: Inputs, unwritten: bool) -> tuple[str, str]:
    """(outcome, detail) of one sample."""
    try:
        wanted, after = eager(function, inputs, 0)
        again, after_again = eager(function, inputs, 1)
    except Exception as error:
        return "eager fails", f"{type(error).__name__}: {error}"
    pairs = zip([*wanted, *after], [*again, *after_again])
    random = unwritten or any(not repeated(a, b) for a, b in pairs)
    try:
        args, kwargs = copied(inputs)
        compiled = accel.compile(function, inputs=args, kwargs=kwargs, options={"cache": False})
        args, kwargs = copied(inputs)
        got, _ = tree.flatten(compiled(*args, **kwargs))
    except AccelError as error:
        return "refused", f"{error.id} {error.what}"
    if len(got) != len(wanted):
        return "wrong", f"{len(got)} results, not {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted)):
        said = difference(a, b, random)
        if said and not as_precise(a, b, i, function, inputs):
            return "wrong", f"result {i}: {said}"
    for i, (a, b) in enumerate(zip(tree.flatten((args, kwargs))[0], after)):
        said = difference(a, b, random)
        if said:
            return "wrong", f"input {i} after the call: {said}"
    fallbacks = sorted(set(_FALLBACK.findall(compiled.ir("captured"))))
    return ("right, torch", ", ".join(fallbacks)) if fallbacks else ("right", "")


def copied(inputs: Inputs) -> Inputs:
    leaves, node = tree.flatten(inputs)
    copies = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
    again: Inputs = tree.unflatten(node, copies)
    return again


def eager(function: Callable[..., Any], inputs: Inputs, seed: int) -> tuple[list[Any], list[Any]]:
    """Results, and the inputs after the call. Samples that set a seed themselves get ours."""
    args, kwargs = copied(inputs)
    set_seed = torch.manual_seed
    set_seed(seed)
    torch.manual_seed = lambda seed: torch.default_generator
    try:
        results, _ = tree.flatten(function(*args, **kwargs))
    finally:
        torch.manual_seed = set_seed
    return results, tree.flatten((args, kwargs))[0]


def repeated(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a.shape == b.shape and not difference(a, b, random=False)


def difference(a: Any, b: Any, random: bool) -> str:
    """The first line that says how `a` differs from eager's `b`; "" if it does not."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if a == b else f"{a}, not {b}"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
    try:
        if not random:
            torch.testing.assert_close(a, b, equal_nan=True)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def as_precise(
    got: Any, eager_result: Any, index: int, function: Callable[..., Any], inputs: Inputs
) -> bool:
    """Whether `got` is as near to the float64 result as float32 arithmetic may be expected to be.

    That is twice as far as eager's result, or as far as float64's own result moves, four times,
    when the inputs change by one unit of rounding (a saturated softmax of large products).
    """
    if not isinstance(got, Tensor) or not got.is_floating_point():
        return False
    if got.shape != eager_result.shape or got.dtype != eager_result.dtype:
        return False
    eps = torch.finfo(got.dtype).eps
    exact = wide_result(function, inputs, index, 0.0)
    moved = [wide_result(function, inputs, index, eps, seed) - exact for seed in range(4)]
    condition = torch.stack([m.abs().max() for m in moved]).max()
    allowed = torch.maximum(2 * (eager_result - exact).abs().max(), 4 * condition)
    return bool((got - exact).abs().max() <= allowed)


def wide_result(
    function: Callable[..., Any], inputs: Inputs, index: int, change: float, seed: int = 0
) -> Tensor:
    """Result `index` in float64, with every input element changed by +-`change` of itself."""
    generator = torch.Generator().manual_seed(seed)

    def widened(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        signs = torch.randint(0, 2, t.shape, generator=generator) * 2 - 1
        return t.double() * (1 + change * signs)

    leaves, node = tree.flatten(copied(inputs))
    args, kwargs = tree.unflatten(node, [widened(t) for t in leaves])
    results, _ = tree.flatten(function(*args, **kwargs))
    wide: Tensor = results[index].double()
    return wide


def measure(info: Any, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """{"counts": samples by outcome, and the different details of each outcome}."""
    counts: Counter[str] = Counter()
    details: dict[str, list[str]] = {}
    for function, inputs in samples(info, dtype, count):
        try:
            outcome, detail = judge(function, inputs, info.name in UNWRITTEN)
        except Exception as error:  # anything untyped is a defect, and is reported as one
            outcome, detail = "crashed", f"{type(error).__name__}: {str(error)[:200]}"
        counts[outcome] += 1
        said = details.setdefault(outcome, [])
        line = " ".join(detail.split())[:200]
        if line and line not in said:
            said.append(line)
    return {"counts": dict(counts), **{k: v for k, v in details.items() if v}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="part of an operator's name; stores nothing")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--again", action="store_true", help="also what is stored already")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    data = load_results("op_db") or {"dtypes": {}}
    stored = data["dtypes"].setdefault(options.dtype, {"samples": options.samples, "rows": {}})
    rows: dict[str, Any] = {} if options.only else stored["rows"]
    for info in op_db:
        name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        if options.only not in name or (name in rows and not options.again):
            continue
        if not info.supports_dtype(getattr(torch, options.dtype), "cpu"):
            continue
        rows[name] = measure(info, getattr(torch, options.dtype), options.samples)
        if any(outcome in rows[name] for outcome in DEFECTS) or options.only:
            print(name, rows[name], flush=True)
        if not options.only:
            stored["total"] = total(rows)
            store_results("op_db", {**data, "machine": machine()})
    print(f"{len(rows)} operators, samples: {total(rows)}")


def total(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows.values():
        counts.update(row["counts"])
    return dict(sorted(counts.items()))


if __name__ == "__main__":
    main()
