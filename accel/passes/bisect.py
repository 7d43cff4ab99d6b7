"""From a wrong output to the pass, to the rewrite, to a small failing program, to a pytest file.

    finding = bisect(module, "canonicalize,cse,fuse")
    print(finding.summary())
    Path("test_found.py").write_text(finding.test_source)

1. The pipeline runs with every contract checked: the first pass that fails is at fault.
2. Fuel numbers single rewrites: a binary search finds the first one with which that pass fails.
3. Delta debugging (`accel.passes.reduce`) cuts the function down around that rewrite's op.
4. The result is written as a test that needs nothing but accel: IR text, weights, seed and check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accel.ir.module import Module, Op
from accel.ir.parser import parse_module
from accel.ir.printer import print_module
from accel.ir.types import DTYPE_BY_NAME, DTYPE_NAMES, TensorType
from accel.passes.base import Context, Pass
from accel.passes.dce import drop_unread_weights
from accel.passes.manager import PassManager
from accel.passes.pipeline import format_pass, parse_pipeline
from accel.passes.reduce import reduce_function
from accel.passes.sampling import random_tensor

_MOST_LITERALS = 512
Weights = Mapping[str, Mapping[str, Any]]


@dataclass
class Finding:
    """What bisection found.

    Attributes:
        pass_index: the pass's place in the pipeline, from 1.
        fuel: rewrites of the whole pipeline up to and with the wrong one (`Context.fuel`); None if
            the pass fails without any rewrite that it asked fuel for.
        rewrite: the same, counted within the pass.
        rule: the rule that made the wrong rewrite, and the op it started from.
        error: what the check says of the small program.
        module: the small program, before the pass.
        test_source: a runnable pytest file.
    """

    pass_index: int
    pass_text: str
    fuel: int | None
    rewrite: int | None
    rule: str
    op: str
    where: str
    error: str
    module: Module
    test_source: str

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [f"pass {self.pass_index:02d}: {self.pass_text}"]
        if self.rewrite is not None:
            lines.append(f"rewrite {self.rewrite} of the pass (fuel {self.fuel}): rule {self.rule}")
            lines.append(f"at: {self.op}" + (f" ({self.where})" if self.where else ""))
        lines.append(self.error)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.pass_text,
            "pass_index": self.pass_index,
            "fuel": self.fuel,
            "rewrite": self.rewrite,
            "rule": self.rule,
            "op": self.op,
            "where": self.where,
            "error": self.error,
            "ir": print_module(self.module),
            "test": self.test_source,
        }


def bisect(
    module: Module,
    pipeline: str | Sequence[str | Pass],
    *,
    context: Callable[[], Context] = Context,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Finding | None:
    """Finds the first wrong rewrite of a pipeline; None if every contract holds.

    Args:
        module: the program before the pipeline; it is not changed.
        context: makes a fresh context for each run.
        seed: of the random inputs.
        log: told what is being tried.
    """
    passes = parse_pipeline(pipeline)
    good, spent = module.clone(), 0
    for index, each in enumerate(passes, start=1):
        log(f"pass {index:02d} {each.name}")
        trial = _Trial(each, context, seed)
        after = good.clone()
        if trial.run(after) is None:
            good, spent = after, spent + trial.rewrites
            continue
        return _explain(good, index, each, spent, trial, log)
    return None


class _Trial:
    """Runs one pass with its check; remembers how many rewrites happened, and the last one."""

    def __init__(self, each: Pass, context: Callable[[], Context], seed: int) -> None:
        self.each, self.context, self.seed = each, context, seed
        self.rewrites = 0

    def run(
        self,
        module: Module,
        fuel: int | None = None,
        watch: Callable[[int, str, Op | None], None] = lambda number, rule, op: None,
    ) -> Exception | None:
        """The error, if the pass fails on this module (which it changes).

        `watch` is called before each rewrite with its number, its rule and the op.
        """
        context = self.context()
        context.fuel = fuel
        self.rewrites = 0

        def on_rewrite(pass_name: str, rule: str, op: Op | None) -> None:
            self.rewrites += 1
            watch(self.rewrites, rule, op)

        context.on_rewrite = on_rewrite
        try:
            PassManager([self.each], context, validate=True, seed=self.seed).run(module)
        except Exception as error:  # a crash is a finding like any other
            return error
        return None

    def fails(self, module: Module, kind: type[Exception]) -> bool:
        """Whether the pass fails on a copy of the module, in the same way."""
        return isinstance(self.run(module.clone()), kind)


def _explain(
    good: Module, index: int, each: Pass, spent: int, trial: _Trial, log: Callable[[str], None]
) -> Finding:
    error = trial.run(good.clone())
    assert error is not None
    kind = type(error)
    total = trial.rewrites
    rewrite = _first_bad_rewrite(good, trial, total, log)
    culprit = _Culprit() if rewrite is None else _wrong_rewrite(good, trial, rewrite)
    function = culprit.function or _function_at_fault(good, error)
    log("reducing")

    def fails(candidate: Module) -> bool:
        return trial.fails(candidate, kind)

    small = good
    if fails(good):
        small = reduce_function(good, function, fails, culprit.number)
    drop_unread_weights(small)
    weights = _test_weights(small, fails)
    final = trial.run(small.clone()) or error
    source = _test_source(small, each, trial.seed, weights, str(final))
    return Finding(
        index,
        format_pass(each),
        None if rewrite is None else spent + rewrite,
        rewrite,
        culprit.rule,
        culprit.text,
        culprit.where,
        str(final),
        small,
        source,
    )


def _first_bad_rewrite(
    good: Module, trial: _Trial, total: int, log: Callable[[str], None]
) -> int | None:
    """The smallest fuel with which the pass fails; None if it fails without any."""
    if trial.run(good.clone(), fuel=0) is not None:
        return None
    low, high = 0, total  # good with low, bad with high
    while high - low > 1:
        middle = (low + high) // 2
        log(f"fuel {middle}")
        if trial.run(good.clone(), fuel=middle) is None:
            low = middle
        else:
            high = middle
    return high


@dataclass
class _Culprit:
    """The wrong rewrite: its rule, its op (as text, and its number in its function), its place."""

    rule: str = ""
    text: str = ""
    where: str = ""
    number: int | None = None
    function: str = ""


def _wrong_rewrite(good: Module, trial: _Trial, rewrite: int) -> _Culprit:
    copy = good.clone()
    numbers = {
        op: (name, i)
        for name, function in copy.functions.items()
        for i, op in enumerate(function.ops)
    }
    found = _Culprit()

    def watch(number: int, rule: str, op: Op | None) -> None:
        if number != rewrite:
            return
        found.rule = rule
        if op is not None:
            found.text, found.where = repr(op), str(op.location or "")
            found.function, found.number = _nearest(op, numbers)

    trial.run(copy, rewrite, watch)
    return found


def _nearest(op: Op, numbers: Mapping[Op, tuple[str, int]]) -> tuple[str, int | None]:
    """The op itself or, for one that the pass made, the nearest op before it from the input."""
    queue, seen = [op], {op}
    for each in queue:
        if each in numbers:
            return numbers[each]
        new = [v.op for v in each.operands if v.op is not None and v.op not in seen]
        queue.extend(new)
        seen.update(new)
    return "", None


def _function_at_fault(module: Module, error: Exception) -> str:
    text = f"{error} {getattr(error, 'where', '')}"
    for name in module.functions:
        if f"@{name}" in text:
            return name
    return next(iter(module.functions))


# -- the test file ------------------------------------------------------------------------------


def replay(text: str, pipeline: str, *, seed: int = 0, weights: Weights | None = None) -> Module:
    """What a generated test runs: the passes on IR text, with every contract checked.

    `weights` gives values (name -> {"dtype": "f32", "values": nested lists}); others are random
    by the seed. Returns the module after the passes. Raises what the check raises.
    """
    module = parse_module(text)
    fill_weights(module, seed, weights or {})
    PassManager(pipeline, validate=True, seed=seed).run(module)
    return module


def fill_weights(module: Module, seed: int, given: Weights) -> None:
    """Puts a tensor into the store for every weight that the program names."""
    generator = torch.Generator().manual_seed(seed)
    types = {str(op.attributes["name"]): op.result.type for op in _constants(module)}
    for name in [n for n in module.weights if n in types]:
        module.weights.remove(name)
    for name, type in sorted(types.items()):
        if name in given:
            dtype = DTYPE_BY_NAME[given[name]["dtype"]]
            tensor = torch.tensor(given[name]["values"], dtype=dtype)
        else:
            tensor = random_tensor(type, generator)
        module.weights.add(name, tensor)


def _constants(module: Module) -> list[Op]:
    return [op for op in module.walk() if op.name == "constant"]


def _test_weights(module: Module, fails: Callable[[Module], bool]) -> dict[str, Any]:
    """The weights that the test must spell out; puts random ones in place where those do."""
    if not len(module.weights):
        return {}
    copy = module.clone()
    fill_weights(copy, 0, {})
    if fails(copy):
        module.weights = copy.weights
        return {}
    literals: dict[str, Any] = {}
    for name in module.weights:
        type: TensorType = module.weights.type(name)
        if int(type.numel()) <= _MOST_LITERALS and type.dtype.itemsize:
            values = module.weights.tensor(name).tolist()
            literals[name] = {"dtype": DTYPE_NAMES[type.dtype], "values": values}
    return literals


def _test_source(module: Module, each: Pass, seed: int, weights: dict[str, Any], error: str) -> str:
    home = type(each).__module__
    text = print_module(module).rstrip().replace("\\", "\\\\")
    first = error.splitlines()[0]
    imports = ["from accel.passes.bisect import replay"]
    if not home.startswith("accel.passes"):
        imports.insert(0, f"import {home}  # noqa: F401 (registers the pass)")
    arguments = f"IR, {json.dumps(format_pass(each))}, seed={seed}"
    body = [f'"""{first}"""', "", *imports, "", f'IR = """\n{text}\n"""']
    if weights:
        body += ["", f"WEIGHTS = {json.dumps(weights)}"]
        arguments += ", weights=WEIGHTS"
    body += ["", "", "def test_reduced() -> None:", f"    replay({arguments})", ""]
    return "\n".join(body)
