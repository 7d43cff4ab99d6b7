"""What a pass is: a dataclass with a name, a contract and `run(module, context)`.

    @register_pass
    @dataclass
    class DeadCode(Pass):
        \"\"\"Removes pure ops without users. (paper; before/after in IR text)\"\"\"

        name: ClassVar[str] = "dce"
        contract: ClassVar[Contract] = EXACT

        def run(self, module: Module, context: Context) -> None: ...

Dataclass fields are the options: `--pass quantize{bits=4,group=64}` and recipes use their names.
The pass manager (`accel.passes.manager`) verifies, compares, times and checks contracts; a pass
only rewrites, and calls `context.rewrite(rule)` before each single rewrite (fuel and ledger).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.ir.capability import KernelGenerator, Library, LibraryMatch
from accel.ir.module import Module, Op
from accel.names import near


@dataclass(frozen=True)
class Contract:
    """What a pass promises.

    `exact`: the same function over the reals. `stores_constants` says that the pass computes new
    constants in float64 and rounds them once, so results may differ by that rounding.
    `approximate`: lossy; `metric` on calibration inputs stays within `bound`.
    `replaces` are functions that get other arguments, so that no run of theirs can be compared:
    the pass says what of them holds in `Pass.check`.
    """

    kind: Literal["exact", "approximate"]
    stores_constants: bool = False
    metric: str = ""
    bound: float = 0.0
    replaces: tuple[str, ...] = ()


EXACT = Contract("exact")
EXACT_CONSTANTS = Contract("exact", stores_constants=True)


def approximate(metric: str, bound: float) -> Contract:
    """Lossy within `bound` of `metric` (a name in `accel.passes.metrics`)."""
    return Contract("approximate", metric=metric, bound=bound)


@dataclass
class Context:
    """What passes may know besides the program. Made by the compiler, or by a test with defaults.

    Attributes:
        target: the target's description (`accel.compiler.targets.Target`), or None.
        generator: the kernel generator for fusion planning, or None.
        libraries: vendor calls in order of preference.
        calibration: input tuples for lossy passes (weights-only ones may do without).
        fuel: how many rewrites may still happen; None is without limit.
        on_rewrite: called with (pass name, rule name, op) for every rewrite that happens.
        on_miss: called with (rule, op, reason) where a rule nearly fired, for `accel explain`.
        notes: facts that the running pass leaves for its row of the ledger (JSON-able).
        precise: while a contract is being checked, the float64 originals of stored constants.
    """

    target: Any = None
    generator: KernelGenerator | None = None
    libraries: Sequence[Library] = ()
    calibration: Sequence[Sequence[Tensor]] = ()
    fuel: int | None = None
    current_pass: str = ""
    on_rewrite: Callable[[str, str, Op | None], None] | None = None
    on_miss: Callable[[str, Op, str], None] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    precise: dict[str, Tensor] | None = None

    def rewrite(self, rule: str, op: Op | None = None) -> bool:
        """Whether one more rewrite may happen; counts it if so. Ask before changing anything."""
        if self.fuel is not None:
            if self.fuel <= 0:
                return False
            self.fuel -= 1
        if self.on_rewrite is not None:
            self.on_rewrite(self.current_pass, rule, op)
        return True

    def store_constant(
        self, module: Module, name: str, value: Tensor, dtype: torch.dtype, *, origin: str = ""
    ) -> str:
        """Stores a new constant computed in float64, rounded once to `dtype`; returns its name.

        A pass that changes the numbers of weights stores them only this way (and says
        `EXACT_CONSTANTS`): the contract check then knows what rounding alone explains.
        """
        stored = module.weights.add(name, value.to(dtype).contiguous(), origin=origin)
        if self.precise is not None and dtype.is_floating_point:
            self.precise[stored] = value
        return stored

    def miss(self, rule: str, op: Op, reason: str) -> None:
        """A rule nearly fired: say which attribute, second user or type stood in the way."""
        if self.on_miss is not None:
            self.on_miss(rule, op, reason)


class Pass(ABC):
    """Base of all passes; subclasses are dataclasses whose fields are the options."""

    name: ClassVar[str]
    contract: ClassVar[Contract] = EXACT

    @abstractmethod
    def run(self, module: Module, context: Context) -> None:
        """Rewrites the module in place."""

    def promise(self) -> Contract:
        """The contract under these options; a lossy pass with a `bound` option promises that."""
        return self.contract

    def check(self, module: Module, seed: int) -> float:
        """What the pass promises besides its contract; the manager asks when it checks contracts.

        Returns the relative error that it found. Raises ContractError past what is allowed.
        """
        return 0.0

    def options(self) -> dict[str, Any]:
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.name}{{{options}}}" if options else self.name


_PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: makes the pass known by its name to the CLI and to recipes."""
    if cls.name in _PASSES:
        raise OptionError(f"pass '{cls.name}' is registered twice")
    _PASSES[cls.name] = cls
    return cls


def pass_class(name: str) -> type[Pass]:
    """The pass of this name; OptionError with near names if there is none."""
    if name not in _PASSES:
        raise OptionError(f"no pass named '{name}'", advice=near(name, _PASSES))
    return _PASSES[name]


def all_passes() -> dict[str, type[Pass]]:
    return dict(sorted(_PASSES.items()))


__all__ = [
    "EXACT",
    "EXACT_CONSTANTS",
    "Context",
    "Contract",
    "KernelGenerator",
    "Library",
    "LibraryMatch",
    "Pass",
    "all_passes",
    "approximate",
    "pass_class",
    "register_pass",
]
