"""Runs a pipeline of passes over a module, and keeps the books.

    manager = PassManager("canonicalize,cse,dce", Context(), validate=True, dump_dir="dumps")
    ledger = manager.run(module)

A pass that has had nothing to do on a program does not run on it again before something changes.
After each pass the manager verifies the module, tells whether it changed by comparing programs (a
pass never reports on itself), times the pass, numbers a dump (`03_fuse.mlir`) and writes a ledger
row. With `validate` it checks the pass's contract (`accel.passes.contracts`). An approximate pass
is also measured without `validate` if the context holds calibration inputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from accel.errors import AccelError, ContractError, OptionError
from accel.ir.cost import Cost, CostMeter, Rates
from accel.ir.module import Module, Op
from accel.ir.printer import print_module
from accel.ir.snapshot import Snapshot
from accel.ir.verify import verify
from accel.names import near
from accel.passes.base import Context, Pass
from accel.passes.contracts import Checker, Evidence, Sample
from accel.passes.dumps import Dumps
from accel.passes.ledger import Ledger, PassRow
from accel.passes.pipeline import parse_pipeline


class PassManager:
    """A pipeline with its context and its checks.

    Args:
        pipeline: text (`canonicalize,quantize{bits=4}`), or a list of texts and passes.
        context: target, fuel, calibration inputs, callbacks; a fresh one by default.
        validate: check every contract.
        on_violation: for an approximate pass past its bound: "raise" ContractError, or "undo" it.
        dump_dir: folder for numbered dumps; none are written without.
        print_after: names of passes after which the module is printed, or "all".
        stop_after: the name of the pass (or its number, from 1) to stop after.
        seed: of the random inputs of contract checks.
        stream: where `print_after` prints; stderr by default.

    Raises OptionError for unknown passes and options.
    """

    def __init__(
        self,
        pipeline: str | Sequence[str | Pass],
        context: Context | None = None,
        *,
        validate: bool = False,
        on_violation: Literal["raise", "undo"] = "raise",
        dump_dir: str | Path | None = None,
        print_after: Sequence[str] | str = (),
        stop_after: str | int | None = None,
        seed: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        self.passes = parse_pipeline(pipeline)
        self.context = context or Context()
        self.validate = validate
        self.on_violation = on_violation
        self.dumps = Dumps(dump_dir) if dump_dir is not None else None
        self.print_after = [print_after] if isinstance(print_after, str) else list(print_after)
        self.stop_after = stop_after
        self.stream = stream
        self.checker = Checker(seed, self.context.calibration)
        self.state: _State | None = None  # after the last pass
        names = sorted({p.name for p in self.passes})
        for name in [n for n in (*self.print_after, stop_after) if isinstance(n, str)]:
            if name not in (*names, "all"):
                raise OptionError(f"no pass '{name}' in this pipeline", advice=near(name, names))

    def run(self, module: Module, after: PassManager | None = None) -> Ledger:
        """Runs the passes in place. Returns the ledger.

        Args:
            after: has run on this module. If nothing has changed since, what it verified and
                measured last holds.

        Raises VerifyError where a pass left a broken program, and ContractError where one broke its
        promise; both name the pass.
        """
        ledger = Ledger()
        if self.dumps is not None:
            self.dumps.write(0, "input", module)
        last = after.state if after is not None else None
        if last is not None and Snapshot(module).same_program(last.snapshot):
            state = last
            state.forget(keep_exact=False)
        else:
            verify(module)
            state = _State(module, self.context.target)
        self.state = state
        for index, each in enumerate(self.passes, start=1):
            row = self._run_one(index, each, module, state, ledger)
            ledger.rows.append(row)
            if self.dumps is not None:
                self.dumps.write(index, each.name, module)
            if each.name in self.print_after or "all" in self.print_after:
                print(f"// after {index:02d} {each}", file=self.stream or sys.stderr)
                print(print_module(module), file=self.stream or sys.stderr)
            if self.stop_after in (each.name, index):
                break
        return ledger

    def _run_one(
        self, index: int, each: Pass, module: Module, state: _State, ledger: Ledger
    ) -> PassRow:
        row = PassRow(index, each.name, _json_options(each), _contract_text(each))
        row.ops_before, row.before = state.ops, state.cost
        if not self._must_check(each) and state.idle.get(str(each)) is state.snapshot:
            row.notes = {"skipped": "it left this very program as it is before"}
            row.ops_after, row.after = state.ops, state.cost
            return row
        check_start = time.perf_counter()
        samples = self._samples(each, module, state)
        backup = self._backup(each, module)
        row.check_seconds = time.perf_counter() - check_start
        try:
            precise = self._run_pass(each, module, row, ledger)
            start = time.perf_counter()
            snapshot = Snapshot(module)
            row.changed = not snapshot.same_program(state.snapshot)
            if row.changed:
                settled = snapshot.settled(state.snapshot)
                verify(module, settled)
                state.update(snapshot, module, settled)
            row.verify_seconds = time.perf_counter() - start
        except AccelError as error:
            error.add_note(f"in pass {index:02d} '{each}'")
            if not error.where:
                error.where = f"pass {index:02d} '{each.name}'"
            raise
        if samples is not None and (row.changed or precise):
            start = time.perf_counter()
            evidence = self.checker.check(each.name, each.promise(), samples, module, precise)
            more = each.check(module, self.checker.seed) if self.validate else 0.0
            row.check_seconds += time.perf_counter() - start
            row.error, row.metric = max(evidence.error, more), evidence.metric
            row.measured_on = evidence.measured_on
            if not evidence.within:
                self._violated(each, evidence, module, backup, row, state)
            state.forget(keep_exact=each.promise().kind == "exact" and not precise)
        elif samples is not None:
            row.error = 0.0
        elif row.changed:
            state.forget(keep_exact=False)
        if not row.changed and not row.rewrites:
            state.idle[str(each)] = state.snapshot
        row.ops_after, row.after = state.ops, state.cost
        return row

    def _run_pass(self, each: Pass, module: Module, row: PassRow, ledger: Ledger) -> dict[str, Any]:
        """Runs the pass with callbacks that fill the row; returns the precise constants."""
        context = self.context
        saved = (context.on_rewrite, context.on_miss, context.notes, context.precise)
        outer_rewrite, outer_miss = context.on_rewrite, context.on_miss

        def on_rewrite(pass_name: str, rule: str, op: Op | None) -> None:
            row.rewrites[rule] = row.rewrites.get(rule, 0) + 1
            if outer_rewrite is not None:
                outer_rewrite(pass_name, rule, op)

        def on_miss(rule: str, op: Op, reason: str) -> None:
            ledger.add_miss(each.name, rule, op.name, str(op.location or ""), reason)
            if outer_miss is not None:
                outer_miss(rule, op, reason)

        context.current_pass = each.name
        context.on_rewrite, context.on_miss, context.notes = on_rewrite, on_miss, {}
        context.precise = {} if self.validate else None
        start = time.perf_counter()
        try:
            each.run(module, context)
        finally:
            row.seconds = time.perf_counter() - start
            row.notes = dict(context.notes)
            precise = context.precise or {}
            context.on_rewrite, context.on_miss, context.notes, context.precise = saved
            context.current_pass = ""
        return precise

    def _must_check(self, each: Pass) -> bool:
        measured = each.promise().kind == "approximate" and bool(self.context.calibration)
        return self.validate or measured

    def _samples(self, each: Pass, module: Module, state: _State) -> list[Sample] | None:
        """Results before the pass; those of the last check are still good if nothing changed."""
        if not self._must_check(each):
            return None
        kind = each.promise().kind
        if kind not in state.samples:
            state.samples[kind] = self.checker.before(module, each.promise())
        return state.samples[kind]

    def _backup(self, each: Pass, module: Module) -> Module | None:
        undo = self.on_violation == "undo" and each.promise().kind == "approximate"
        return module.clone() if undo and self._must_check(each) else None

    def _violated(
        self,
        each: Pass,
        evidence: Evidence,
        module: Module,
        backup: Module | None,
        row: PassRow,
        state: _State,
    ) -> None:
        if backup is None:
            raise ContractError(
                f"pass '{each.name}' promises {evidence.metric} <= {evidence.bound:g}, measured "
                f"{evidence.error:.4g} on {evidence.measured_on}",
                where=evidence.result,
                advice='a milder option, or on_violation="undo" to go on without the pass',
            )
        module.functions, module.weights = backup.functions, backup.weights
        module.metadata = backup.metadata
        row.undone = True
        state.update(Snapshot(module), module)


class _State:
    """What is known about the module between two passes."""

    def __init__(self, module: Module, rates: Rates | None) -> None:
        self.meter = CostMeter(rates)
        # Passes, with their options, by the program that they had nothing to do on.
        self.idle: dict[str, Snapshot] = {}
        self.update(Snapshot(module), module)
        self.samples: dict[str, list[Sample]] = {}  # by kind of contract, while still valid

    def forget(self, *, keep_exact: bool) -> None:
        """Drops results that a pass made stale; an exact pass keeps those of the oracle."""
        self.samples = {k: v for k, v in self.samples.items() if keep_exact and k == "exact"}

    def update(
        self, snapshot: Snapshot, module: Module, settled: frozenset[Op] = frozenset()
    ) -> None:
        self.snapshot = snapshot
        self.cost: Cost = self.meter.measure(module, settled)
        self.ops = snapshot.ops


def run_pipeline(
    module: Module,
    pipeline: str | Sequence[str | Pass],
    context: Context | None = None,
    **options: Any,
) -> Ledger:
    """`PassManager(pipeline, context, **options).run(module)`."""
    return PassManager(pipeline, context, **options).run(module)


def count_ops(module: Module) -> int:
    """Ops in all functions and nested regions, without terminators' own."""
    return sum(1 for _ in module.walk())


def _contract_text(each: Pass) -> str:
    c = each.promise()
    return "exact" if c.kind == "exact" else f"{c.metric} <= {c.bound:g}"


def _json_options(each: Pass) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

    return {k: plain(v) for k, v in each.options().items()}
