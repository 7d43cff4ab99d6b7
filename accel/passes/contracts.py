"""Checks that a pass kept its promise, by running the program before and after on equal inputs.

`exact`: the float64 oracle before and after agrees to a relative error of 1e-9, on random inputs
of two kinds. Constants that the pass computed and stored (`Context.store_constant`) must be the
float64 originals rounded once; the comparison itself then runs on the originals, so the check
allows the rounding of stored constants and nothing more. An `accel.aten` may call a kernel that has
no float64 version; functions with one are compared to half the digits of its dtype.

`approximate(metric, bound)`: the metric over calibration inputs (or random ones, and the evidence
says so), in the program's own dtypes, stays within the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.errors import ContractError, InterpretError
from accel.ir.interpret import interpret
from accel.ir.module import Function, Module
from accel.ir.storage import WeightStore
from accel.passes.base import Contract
from accel.passes.metrics import metric
from accel.passes.sampling import valid_inputs

EXACT_TOLERANCE = 1e-9
# Results smaller than this everywhere are compared on its scale: they are what cancellation left.
_SMALL = 1e-6


@dataclass
class Sample:
    """Inputs of one function, and what it computed from them."""

    function: str
    inputs: Sequence[Tensor]
    results: list[Tensor]
    origin: str  # "random" or "calibration"
    tolerance: float = EXACT_TOLERANCE


@dataclass
class Evidence:
    """What a check measured."""

    error: float
    metric: str
    bound: float
    measured_on: str
    within: bool = True
    result: str = ""  # the worst result, e.g. "result 0 of @main"


@dataclass
class Checker:
    """Runs a module before and after a pass. One checker serves a whole pipeline.

    Attributes:
        seed: of random inputs and of the program's own random draws.
        calibration: inputs of @main for approximate contracts, or empty.
    """

    seed: int = 0
    calibration: Sequence[Sequence[Tensor]] = ()
    _inputs: dict[str, list[tuple[Sequence[Tensor], str]]] = field(default_factory=dict)

    def before(self, module: Module, contract: Contract) -> list[Sample]:
        """Results of every function, to be compared after the pass."""
        oracle = contract.kind == "exact"
        samples: list[Sample] = []
        for function in module.functions.values():
            if function.name in contract.replaces:
                continue
            for inputs, origin in self._inputs_of(function, module, contract):
                results = self._run(function, inputs, module.weights, oracle)
                tolerance = exact_tolerance(function)
                samples.append(Sample(function.name, inputs, results, origin, tolerance))
        return samples

    def check(
        self,
        name: str,
        contract: Contract,
        samples: Sequence[Sample],
        module: Module,
        precise: Mapping[str, Tensor],
    ) -> Evidence:
        """Compares `module` with the samples; the evidence says whether the contract holds.

        Raises ContractError naming pass, function, result and error where an exact one does not,
        and where a function that was there is gone or has another signature.
        """
        _check_constants(name, contract, module, precise)
        weights = _with_originals(module.weights, precise)
        oracle = contract.kind == "exact"
        worst = Evidence(0.0, "", contract.bound, "random inputs")
        for sample in samples:
            function = module.functions.get(sample.function)
            if function is None:
                raise ContractError(f"pass '{name}' removed @{sample.function}")
            _check_signature(name, function, sample)
            try:
                results = self._run(function, sample.inputs, weights, oracle)
            except InterpretError as error:
                raise ContractError(
                    f"after pass '{name}', @{function.name} does not run: {error.what}",
                    where=error.where,
                ) from error
            worst = self._compare(name, contract, sample, results, worst)
        return worst

    def _compare(
        self,
        name: str,
        contract: Contract,
        sample: Sample,
        results: Sequence[Tensor],
        worst: Evidence,
    ) -> Evidence:
        if contract.kind == "exact":
            for i, (old, new) in enumerate(zip(sample.results, results)):
                error = exact_error(old, new)
                where = f"result {i} of @{sample.function}"
                if not error <= sample.tolerance:
                    raise ContractError(
                        f"pass '{name}' promises to be exact, but {where} changed by {error:.3g} "
                        f"(relative, float64; allowed: {sample.tolerance:.3g})",
                        where=where,
                        advice="`accel bisect` finds the rewrite and a small failing program",
                    )
                if error >= worst.error:
                    worst = Evidence(
                        error, "relative_error", sample.tolerance, "random inputs", True, where
                    )
            return worst
        error = metric(contract.metric)(sample.results, results)
        if error >= worst.error or error != error:
            within = error <= contract.bound
            measured = f"{sample.origin} inputs"
            where = f"@{sample.function}"
            worst = Evidence(error, contract.metric, contract.bound, measured, within, where)
        return worst

    def _inputs_of(
        self, function: Function, module: Module, contract: Contract
    ) -> list[tuple[Sequence[Tensor], str]]:
        if contract.kind == "approximate" and self.calibration and function is module.main:
            return [(inputs, "calibration") for inputs in self.calibration]
        if function.name not in self._inputs:
            weights = module.weights
            self._inputs[function.name] = [
                (valid_inputs(function, weights, self.seed), "random"),
                (valid_inputs(function, weights, self.seed + 1, positive=True), "random"),
            ]
        return self._inputs[function.name]

    def _run(
        self, function: Function, inputs: Sequence[Tensor], weights: WeightStore, oracle: bool
    ) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return interpret(function, inputs, weights, oracle=oracle)


def _with_originals(weights: WeightStore, precise: Mapping[str, Tensor]) -> WeightStore:
    """A copy of the store in which some tensors are their float64 originals."""
    copy = weights.copy()
    for name, original in precise.items():
        if name in copy:
            copy.remove(name)
            copy.add(name, original)
    return copy


def exact_tolerance(function: Function) -> float:
    """How far the oracle's results may move: 1e-9, or more where torch runs an op by itself."""
    dtypes = [
        v.dtype
        for op in function.walk()
        if op.name == "aten"
        for v in op.operands
        if v.dtype.is_floating_point
    ]
    return max([EXACT_TOLERANCE, *(math.sqrt(torch.finfo(d).eps) for d in dtypes)])


def exact_error(old: Tensor, new: Tensor) -> float:
    """Largest difference over the largest magnitude; inf where shapes, NaNs or integers differ."""
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    if not (old.dtype.is_floating_point or old.dtype.is_complex):
        return 0.0 if torch.equal(old, new) else float("inf")
    if not old.numel():
        return 0.0
    special = ~torch.isfinite(old)
    if special.any() or not torch.isfinite(new).all():
        same = (old == new) | (torch.isnan(old) & torch.isnan(new))
        if not bool((same | ~(special | ~torch.isfinite(new))).all()):
            return float("inf")
        zero = torch.zeros((), dtype=old.dtype)
        old, new = torch.where(special, zero, old), torch.where(special, zero, new)
    scale = max(float(old.abs().max()), _SMALL)
    return float((old - new).abs().max()) / scale


def _check_signature(name: str, function: Function, sample: Sample) -> None:
    types = [a.type for a in function.args]
    if len(types) != len(sample.inputs):
        raise ContractError(
            f"pass '{name}' changed @{function.name} from {len(sample.inputs)} arguments to "
            f"{len(types)}"
        )
    if len(function.results) != len(sample.results):
        raise ContractError(
            f"pass '{name}' changed @{function.name} from {len(sample.results)} results to "
            f"{len(function.results)}"
        )


def _check_constants(
    name: str, contract: Contract, module: Module, precise: Mapping[str, Tensor]
) -> None:
    """Stored constants are their originals, rounded once."""
    if precise and contract.kind == "exact" and not contract.stores_constants:
        raise ContractError(
            f"pass '{name}' stores rounded constants, which its contract does not say",
            advice="declare the contract EXACT_CONSTANTS",
        )
    for weight, original in precise.items():
        if weight not in module.weights:
            continue
        stored = module.weights.tensor(weight)
        if not torch.equal(torch.nan_to_num(stored), torch.nan_to_num(original.to(stored.dtype))):
            raise ContractError(
                f"pass '{name}' stored the constant '{weight}' off by more than one rounding"
            )
