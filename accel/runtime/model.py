"""What a user gets: a callable with the model's own signature, and what is known about it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from accel.errors import InputError, OptionError
from accel.names import near
from accel.runtime.convention import Convention
from accel.runtime.device_loop import stop_tokens
from accel.runtime.executor import CompiledFunction
from accel.runtime.generator import Generator
from accel.runtime.report import explain
from accel.runtime.text import SETTINGS_FILE, TOKENIZER_FILE, Tokenizer
from accel.writes import first_overlap, storage_of, write_back


class State:
    """Tensors that a model changes when it is called, shared by its entry points.

    `initial` gives a first value by weight name. With `shared`, values are those of another program
    of the same model. Values are replaced, never written by this class;
    the plan may write them where it donates them.
    """

    def __init__(self, initial: Callable[[str], Tensor], shared: State | None = None) -> None:
        self._initial = initial
        self._values: dict[str, Tensor] = {} if shared is None else shared._values
        self.lock: threading.Lock = threading.Lock() if shared is None else shared.lock

    def anew(self) -> State:
        """Another one, with first values."""
        return State(self._initial)

    def get(self, name: str, weight: str) -> Tensor:
        if name not in self._values:
            self._values[name] = self._initial(weight).clone()
        return self._values[name]

    def set(self, name: str, value: Tensor) -> None:
        self._values[name] = value

    def reset(self) -> None:
        with self.lock:
            self._values.clear()

    def snapshot(self) -> dict[str, Tensor]:
        with self.lock:
            return {name: value.clone() for name, value in self._values.items()}


class EntryPoint:
    """One compiled function with its calling convention.

    Raises InputError where a call does not fit. Thread-safe; calls of a function with state are
    made one at a time.
    """

    def __init__(self, function: CompiledFunction, convention: Convention, state: State) -> None:
        self.function, self.convention, self._state = function, convention, state
        self.name = function.plan.name
        self._plain = all(a.kind == "input" for a in convention.arguments)
        results = list(enumerate(convention.results))
        self._writes = [(r.argument, i) for i, r in results if r.kind == "mutation"]
        self._states = [(r.argument, i) for i, r in results if r.kind == "state"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self.convention.flatten(args, kwargs)
        return self.convention.unflatten(self.run(leaves))

    def run(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The same on flat lists: inputs without state in, outputs without state out."""
        if self._plain and not self._writes:
            return self.function(leaves)
        with self._state.lock:
            inputs = list(leaves)
            for argument in self.convention.arguments[len(leaves) :]:
                inputs.append(self._state.get(argument.name, argument.initial))
            self._check_overlap(inputs)
            results = write_back(inputs, self.function(inputs), self._writes)
            for place, i in self._states:
                name = self.convention.arguments[place].name
                self._state.set(name, _own(results[i], place, inputs))
        return results[: self.convention.outputs_count]

    def anew(self) -> EntryPoint:
        """The same function with a state of its own, at its first values."""
        return EntryPoint(self.function, self.convention, self._state.anew())

    def _check_overlap(self, inputs: Sequence[Tensor]) -> None:
        found = first_overlap(inputs, [argument for argument, _ in self._writes])
        if found is not None:
            one, other = (f"'{self.convention.arguments[i].name or i}'" for i in found)
            raise InputError(
                f"'{self.name}' writes to its argument {one}, which shares memory with {other}",
                advice="pass a copy of one of them (clone())",
            )


def _own(value: Tensor, argument: int, inputs: Sequence[Tensor]) -> Tensor:
    """A new state in memory that is neither the caller's nor another state's."""
    others = (t for i, t in enumerate(inputs) if i != argument)
    shared = storage_of(value) in {storage_of(t) for t in others} - {0}
    return value.clone() if shared else value


class CompiledModel:
    """A compiled model: call it as the model; other entry points are in `entry_points`.

    Attributes:
        entry_points: name -> callable; calling the model calls the first.
        kept: what the model has changed so far.
    """

    def __init__(
        self,
        entry_points: Mapping[str, EntryPoint],
        state: State,
        *,
        stages: Mapping[str, Callable[[], str]],
        ledger: Mapping[str, Any],
        report: Mapping[str, Any],
        files: Mapping[str, Callable[[], bytes]] | None = None,
    ) -> None:
        self.entry_points = dict(entry_points)
        self._main = next(iter(self.entry_points.values()))
        self.kept = state
        self._stages, self._ledger, self._report = stages, ledger, report
        self._generator: Generator | None = None
        self._files = dict(files or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._main(*args, **kwargs)

    def prepare(self) -> None:
        """Checks and packs all weights now; otherwise the first call of an entry point does."""
        for entry in self.entry_points.values():
            entry.function.prepare()

    @property
    def generator(self) -> Generator:
        """Generates text, if the model was compiled for that (`insert_kv_cache`)."""
        if self._generator is None:
            prefill, decode = (self.entry_points.get(n) for n in ("prefill", "decode"))
            if prefill is None or decode is None:
                raise OptionError(
                    "this model has no key/value cache, so it cannot generate",
                    advice="compile it with accel.compile_generator, or package it with "
                    "accel.package_generator or `accel compile --generate`",
                )
            extend, encode = (self.entry_points.get(n) for n in ("extend", "encode"))
            choices = (self.entry_points.get(n) for n in ("advance", "advance_until"))
            found = [entry.function for entry in choices if entry is not None]
            self._generator = Generator(
                prefill.function.plan,
                prefill.function,
                decode.function,
                prefill.function.device,
                extend.function if extend is not None else None,
                encode.function if encode is not None else None,
                {stop_tokens(f.plan): f for f in found},
            )
        return self._generator

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Text to token ids and back; None if the model carries no tokenizer."""
        if TOKENIZER_FILE not in self._files or SETTINGS_FILE not in self._files:
            return None
        return Tokenizer.of_files(lambda name: self._files[name]())

    def generate(self, input_ids: Any, **options: Any) -> Any:
        """Prompts and what follows them: see `accel.runtime.generator.Generator.generate`.

        Stop strings use the model's own tokenizer, if it carries one and none is passed.
        """
        if options.get("stop_strings") and "tokenizer" not in options:
            options["tokenizer"] = self.tokenizer
        return self.generator.generate(input_ids, **options)

    def report(self) -> dict[str, Any]:
        """What was compiled: target, versions, bytes, steps by kind, what torch runs itself; on a
        GPU which calls are CUDA graphs, and why others are not."""
        steps: dict[str, dict[str, int]] = {}
        fallbacks: dict[str, int] = {}
        for name, entry in self.entry_points.items():
            kinds = steps.setdefault(name, {})
            for step in entry.function.plan.steps:
                kinds[step.kind] = kinds.get(step.kind, 0) + 1
                if step.kind == "aten":
                    fallbacks[step.name] = fallbacks.get(step.name, 0) + 1
        report = {**self._report, "steps": steps, "fallbacks": dict(sorted(fallbacks.items()))}
        functions = {name: entry.function for name, entry in self.entry_points.items()}
        if any(f.device.type == "cuda" for f in functions.values()):
            report["graphs"] = {name: f.graphs() for name, f in functions.items()}
        return report

    def explain(self) -> str:
        """What each pass did, one line a pass."""
        return explain(self._ledger)

    def stages(self) -> list[str]:
        """Names of the IR stages that `ir` knows."""
        return list(self._stages)

    def ir(self, stage: str | None = None) -> str:
        """IR text of a stage (the last one if none is named). OptionError if there is none."""
        names = self.stages()
        wanted = stage or (names[-1] if names else "")
        if wanted not in self._stages:
            raise OptionError(f"no IR stage '{wanted}'", advice=near(wanted, names))
        return self._stages[wanted]()

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors that the model has changed so far."""
        return self.kept.snapshot()

    def reset_state(self) -> None:
        """Back to the values that the model was compiled with."""
        self.kept.reset()
