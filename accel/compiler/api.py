"""The public functions: `compile` for this process, `package` for a file."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accel import tree
from accel.compiler import gpu
from accel.compiler.assemble import to_contents, to_function, to_model
from accel.compiler.language import compile_generator, default_capacity, extension
from accel.compiler.options import Options
from accel.compiler.pipeline import Program, compile_module, tensor_pipeline
from accel.compiler.targets import Target, get_target
from accel.errors import CaptureError, InputError, OptionError
from accel.frontends import autocast
from accel.frontends.export import capture, small_sizes
from accel.ir.module import Module
from accel.passes.pipeline import parse_pipeline
from accel.runtime.artifact import GoldenCase, write_artifact
from accel.runtime.aten import draws
from accel.runtime.convention import describe_parameters
from accel.runtime.golden import golden_case, record
from accel.runtime.memory import collection_paused
from accel.runtime.model import CompiledModel

_MOST_SIGNATURES = 64

Model = nn.Module | Callable[..., Any]


def compile(
    model: Model,
    *,
    inputs: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "cpu",
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    calibration: Sequence[Sequence[Tensor]] = (),
) -> Compiled:
    """Compiles a model for inference.

    Parameters and buffers are frozen into constants. With example `inputs` the model is captured
    and compiled now, for their shapes (sizes in `dynamic_shapes` may vary), and a call that does
    not fit raises InputError. Calls with no or one element along a dynamic axis are a program of
    their own, compiled at the first one (not for a model with state). Without `inputs`, each new
    structure, dtype or shape of inputs compiles at its first call.

    Args:
        model: a module, or any callable over tensors.
        inputs, kwargs: example arguments.
        target: a name of `list_targets()`, or a `Target`.
        dynamic_shapes: as for `torch.export`: {"input_ids": {0: "batch", 1: Dim("length")}}.
        options: an `Options`, or a mapping of its fields.
        calibration: flat input lists on which lossy passes are measured.

    Raises CaptureError, OptionError, ContractError, BackendError.
    """
    for name, given, wanted in (("inputs", inputs, Sequence), ("kwargs", kwargs, Mapping)):
        if given is not None and (not isinstance(given, wanted) or isinstance(given, str)):
            raise InputError(
                f"{name} are a {type(given).__name__}, not a {wanted.__name__.lower()}",
                advice="pass inputs=(x, y), kwargs={'mask': m}: the call's own arguments",
            )
    chosen = Options.of(options)
    parse_pipeline(tensor_pipeline(chosen))  # a misspelt pass is an error now, not at a later call
    made = Compiled(model, get_target(target), chosen, dynamic_shapes, calibration)
    if inputs is not None or kwargs is not None:
        made.fix(inputs or (), kwargs or {})
    elif dynamic_shapes is not None:
        raise OptionError("dynamic_shapes need example inputs", advice="pass inputs=(...) as well")
    return made


def package(
    model: Model,
    inputs: Sequence[Any] = (),
    *,
    path: str | os.PathLike[str],
    kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "cpu",
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    calibration: Sequence[Sequence[Tensor]] = (),
) -> Compiled:
    """Compiles ahead of time into an artifact at `path`, which `accel.load` runs.

    The file appears at once and complete, or not at all. Raises CaptureError for a model in
    training mode, and what `compile` raises.
    """
    if isinstance(model, nn.Module):
        training = [name for name, part in model.named_modules() if part.training]
        if training:
            named = f"its part '{training[0]}'" if training[0] else "it"
            raise CaptureError(
                f"the model cannot be packaged while {named} is in training mode: dropout would be "
                "random and batch norm would learn",
                advice="call model.eval() first",
            )
    made = compile(
        model,
        inputs=inputs,
        kwargs=kwargs or {},
        target=target,
        dynamic_shapes=dynamic_shapes,
        options=options,
        calibration=calibration,
    )
    made.save(path)
    return made


class Compiled:
    """A compiled model with the model's own signature.

    One program per signature of inputs (structure, constants, dtypes, shapes); a single one if
    example inputs were given.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        options: Options,
        dynamic_shapes: Any,
        calibration: Sequence[Sequence[Tensor]],
    ) -> None:
        self.model, self.target, self.options = model, target, options
        self._dynamic_shapes, self._calibration = dynamic_shapes, calibration
        self._fixed: CompiledModel | None = None
        self._small: dict[Any, CompiledModel] = {}  # by the sizes of 0 and 1 along dynamic axes
        self._programs: dict[Any, tuple[Program, CompiledModel, list[Tensor]]] = {}
        self._calls: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._generators: list[tuple[Any, int, int, CompiledModel]] = []
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._fixed is None:
            return self._specialize(args, kwargs)(*args, **kwargs)
        try:
            return self._fixed(*args, **kwargs)
        except InputError as error:
            small = self._for_small(self._fixed, args, kwargs)
            if small is None:
                raise error
        return small(*args, **kwargs)

    def generate(self, input_ids: Any, *, capacity: int | None = None, **options: Any) -> Any:
        """Text of a causal language model: prompts and what follows them, int64 [B, n + new].

        The first call derives and compiles @prefill and @decode (`accel.compile_generator`), and
        @extend for speculation. What the model's `generation_config` says holds where `options`
        and a `generation_config` among them leave it open, as in `transformers`.

        Args:
            input_ids, options: as for `accel.runtime.generator.Generator.generate`, which takes
                what `transformers` does: max_new_tokens, do_sample, temperature, eos_token_id...
                An `assistant_model` may be a model that is not compiled yet.
            capacity: tokens that a text may have; by default what the model's configuration says,
                at most 2048.

        Raises CaptureError for a model that is no causal language model, InputError and OptionError
        for prompts and options that do not fit.
        """
        if options.get("generation_config") is None:
            options["generation_config"] = getattr(self.model, "generation_config", None)
        chosen = capacity or default_capacity(self.model)
        assistant = options.get("assistant_model")
        if isinstance(assistant, nn.Module):
            options["assistant_model"] = self._generator_of(assistant, chosen, 0)
        generator = self._generator_of(self.model, chosen, extension(options))
        return generator.generate(input_ids, **options)

    def _generator_of(self, model: Any, capacity: int, extend: int) -> CompiledModel:
        """A model's generator for at least these sizes; compiled once."""
        with self._lock:
            for made, size, most, compiled in self._generators:
                if made is model and size == capacity and most >= extend:
                    return compiled
            compiled = compile_generator(
                model, capacity=capacity, extend=extend, target=self.target, options=self.options
            )
            self._generators.append((model, capacity, extend, compiled))
            return compiled

    def fix(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compiles for these inputs, and refuses others from now on."""
        self._fixed = self._specialize(args, kwargs)

    def _specialize(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CompiledModel:
        leaves, description = tree.flatten((tuple(args), dict(kwargs)))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        seen = tuple((t.dtype, tuple(t.shape)) for t in tensors)
        key = (repr(description), seen, autocast.current())
        found = self._programs.get(key)
        if found is not None:
            return found[1]
        with self._lock:
            if key not in self._programs:
                if len(self._programs) >= _MOST_SIGNATURES:
                    raise InputError(
                        f"more than {_MOST_SIGNATURES} different input signatures were compiled",
                        advice="pass inputs= and dynamic_shapes= to compile once for all sizes",
                    )
                with collection_paused():
                    program = self._compile(args, kwargs)
                    first = next(iter(self._programs.values()), None)
                    shared = None if first is None else first[1].kept
                    self._programs[key] = (program, to_model(program, shared=shared), tensors)
                    self._calls[key] = (tuple(args), dict(kwargs))
        return self._programs[key][1]

    def _for_small(
        self, fixed: CompiledModel, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> CompiledModel | None:
        """A program for a call with no or one element along dynamic axes, compiled at the first
        such call; None where there are none, and for models with state, of which there is one."""
        (entry, *_), ((_, _, examples), *_) = fixed.entry_points.values(), self._programs.values()
        leaves = tree.flatten((tuple(args), dict(kwargs)))[0]
        ranks = [t.dim() for t in leaves if isinstance(t, Tensor)]
        alike = len(ranks) == len(leaves) and ranks == [t.dim() for t in examples]
        stateless = all(a.kind == "input" for a in entry.convention.arguments)
        if self._dynamic_shapes is None or not alike or not stateless:
            return None
        sizes = tuple(small_sizes(self.model, args, kwargs, self._dynamic_shapes))
        with self._lock:
            if sizes and sizes not in self._small:
                with collection_paused():
                    self._small[sizes] = to_model(self._compile(args, kwargs, small=True))
        return self._small.get(sizes)

    def _compile(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], small: bool = False
    ) -> Program:
        start = time.perf_counter()
        with gpu.processes(self.target, self.options) as pool:
            args, kwargs = self._on_models_device(args, kwargs)
            module = capture(
                self.model, args, kwargs, dynamic_shapes=self._dynamic_shapes, small=small
            )
            forward = self.model.forward if isinstance(self.model, nn.Module) else self.model
            module.main.metadata["parameters"] = describe_parameters(forward)
            seconds = time.perf_counter() - start
            program = compile_module(
                module, self.target, self.options, calibration=self._calibration, pool=pool
            )
        module.dissolve()
        program.seconds = {"capture": seconds, **program.seconds}
        return program

    def _on_models_device(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Example inputs where the model is: a program for a GPU may be made of one on the CPU."""
        if self.target.kind == "cpu" or not isinstance(self.model, nn.Module):
            return args, kwargs
        first = next(self.model.parameters(), None)
        device = first.device if first is not None else torch.device("cpu")
        leaves, description = tree.flatten((tuple(args), dict(kwargs)))
        moved = [t.to(device) if isinstance(t, Tensor) else t for t in leaves]
        made: tuple[Sequence[Any], Mapping[str, Any]] = tree.unflatten(description, moved)
        return made

    def _latest(self) -> tuple[Program, CompiledModel, list[Tensor]]:
        if not self._programs:
            raise InputError(
                "nothing is compiled yet", advice="call the model once, or pass inputs= to compile"
            )
        return next(reversed(self._programs.values()))

    @property
    def program(self) -> Program:
        """The program compiled last."""
        return self._latest()[0]

    def report(self) -> dict[str, Any]:
        """What was compiled: seconds by phase, kernels, steps by kind, what torch runs itself."""
        return self._latest()[1].report()

    def explain(self) -> str:
        """What each pass did."""
        return self._latest()[1].explain()

    def stages(self) -> list[str]:
        return self._latest()[1].stages()

    def ir(self, stage: str | None = None) -> str:
        """IR text: "captured", "optimized" or "kernels" (the default)."""
        return self._latest()[1].ir(stage)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program compiled last as an artifact, with golden vectors if so chosen."""
        program, model, tensors = self._latest()
        golden = []
        if self.options.golden:
            golden += self._golden(program, model, tensors)
        write_artifact(path, to_contents(program, golden))

    def _golden(
        self, program: Program, model: CompiledModel, tensors: Sequence[Tensor]
    ) -> list[GoldenCase]:
        """The recorded call, from first values of state on; of the model itself, where the
        program's device is not here (unless it draws: devices draw different numbers)."""
        entry = next(iter(model.entry_points.values()))
        device = entry.function.device
        if device.type == "cpu" or torch.cuda.is_available():
            return [record(entry.name, entry.anew().run, tensors, device)]
        if draws(program.plans[entry.name]):
            return []
        kept = [t.detach().clone() for t in tensors]
        _, description = tree.flatten(next(reversed(self._calls.values())))
        args, kwargs = tree.unflatten(description, [t.clone() for t in kept])
        with torch.no_grad():
            if isinstance(self.model, nn.Module):
                own = {name: b.clone() for name, b in self.model.named_buffers()}
                result = torch.func.functional_call(self.model, own, tuple(args), kwargs)
            else:
                result = self.model(*args, **kwargs)
        leaves, _ = tree.flatten(result)
        return [golden_case(entry.name, kept, [t for t in leaves if isinstance(t, Tensor)])]


def compile_function(
    module: Module,
    options: Options | Mapping[str, Any] | None = None,
    target: str | Target = "cpu",
    *,
    device: torch.device | None = None,
    keep: Collection[int] | None = None,
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Compiles a captured module to a function on flat lists of tensors (for `torch.compile`).

    On a GPU, `device` says which, and `keep` which results its recordings do not copy.
    """
    with collection_paused():
        program = compile_module(module, get_target(target), Options.of(options))
        return to_function(program, module.main.name, device=device, keep=keep)
