"""`torch.compile(model, backend="accel", options={...})`.

Without gradients, Dynamo's graph is recorded directly, so composites stay whole; parameters become
constants (`freeze`), and every call checks that nobody has changed them since. With gradients,
AOTAutograd makes a forward and a backward graph, with a min-cut partition that recomputes what is
cheaper to recompute than to keep, and both are compiled; the backward when it is first needed.

Options of the frontend, all others go to the compiler:

    freeze                      parameters are constants in inference (default True)
    activation_memory_budget    share of the activations that training may keep, 0 to 1 (default 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, fx
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy

from accel.config import logger
from accel.errors import CaptureError, OptionError
from accel.frontends import flex
from accel.frontends.frozen import Frozen, is_weight
from accel.frontends.graph import Output, Program, import_aten_graph, import_dynamo_graph
from accel.frontends.joint import rewrite_joint
from accel.ir.interpret import interpret
from accel.ir.module import Module
from accel.writes import first_overlap, write_back

Compiled = Callable[[Sequence[Tensor]], Sequence[Tensor]]
CompileFunction = Callable[[Module, Mapping[str, Any], torch.device], Compiled]

_log = logger("frontends")

# cuDNN's batch norm, which is another name for torch's.
_IN_PARTS = [torch.ops.aten.cudnn_batch_norm, torch.ops.aten.cudnn_batch_norm_backward]


def interpret_module(
    module: Module,
    options: Mapping[str, Any],
    device: torch.device | None = None,
) -> Compiled:
    """A `CompileFunction` that runs the reference interpreter."""
    return lambda inputs: interpret(module.main, inputs, module.weights)


def make_backend(compile_function: CompileFunction) -> Callable[..., Any]:
    """A Dynamo backend over any `CompileFunction`.

    `compile_function(module, options, device)` returns a callable over one tensor per argument of
    `module.main`, on that device, that returns one tensor per result. In training the function's
    metadata says which results ("kept") are not the user's: activations and gradients, which live
    until autograd or an optimizer is done with them. The backend raises CaptureError, OptionError,
    and the compiler's errors.
    """

    def backend(
        graph: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        if mode not in (None, "default"):
            raise OptionError(
                f"the accel backend has no mode '{mode}'",
                advice='pass options={"passes": ...} to torch.compile instead',
            )
        rest = dict(options or {})
        freeze = bool(rest.pop("freeze", True))
        budget = float(rest.pop("activation_memory_budget", 1.0))
        if not 0 <= budget <= 1:
            raise OptionError(f"activation_memory_budget is {budget}", advice="give 0 to 1")

        flex.expand(graph)
        device = _device_of(graph, inputs)

        def compile_module(module: Module) -> Compiled:
            with _disable_current_modes():
                return compile_function(module, rest, device)

        if not _wants_gradients(graph, inputs):
            try:
                return InferenceGraph(graph, inputs, compile_module, freeze)
            except CaptureError as error:
                _log.info("recording failed (%s); AOTAutograd's graph is used", error.what)
        return _with_autograd(graph, inputs, compile_module, budget)

    return backend


def _device_of(graph: fx.GraphModule, inputs: Sequence[Any]) -> torch.device:
    """The GPU that tensors lie on; the CPU if none does. Raises CaptureError for several GPUs."""
    tensors = [*(t for t in inputs if isinstance(t, Tensor)), *graph.parameters(), *graph.buffers()]
    found = {t.device for t in tensors if t.device.type != "cpu"}
    if len(found) > 1:
        raise CaptureError(
            f"tensors of one graph lie on {', '.join(sorted(map(str, found)))}",
            advice="compile the parts of the model for each device by themselves",
        )
    return found.pop() if found else torch.device("cpu")


def _wants_gradients(graph: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    return any(t.requires_grad for t in (*tensors, *graph.parameters()))


def _with_autograd(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    compile_module: Callable[[Module], Compiled],
    budget: float,
) -> Callable[..., Any]:
    own = 0  # how many of the forward's outputs are not there for the backward

    def cut(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        nonlocal own
        own = options["num_fwd_outputs"]
        return partition(joint, inputs, **options)

    def inference(aten: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(GraphCallable(import_aten_graph(aten, examples), compile_module))

    def now(aten: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        program = import_aten_graph(aten, examples)
        _mark_kept(program, own)
        return make_boxed_func(GraphCallable(program, compile_module))

    def later(aten: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        program = import_aten_graph(aten, examples, may_fix=False)  # code is made on first use
        _mark_kept(program, 0)
        made: list[GraphCallable] = []

        def run(*args: Any) -> Any:
            if not made:
                made.append(GraphCallable(program, compile_module))
            return made[0](*args)

        return make_boxed_func(run)

    wrapped = aot_autograd(
        fw_compiler=now,
        bw_compiler=later,
        inference_compiler=inference,
        partition_fn=cut,
        decompositions=get_decompositions(_IN_PARTS),
    )
    with functorch_config.patch(activation_memory_budget=budget, recompute_views=True):
        result: Callable[..., Any] = wrapped(graph, inputs)
    return result


def _mark_kept(program: Program, own: int) -> None:
    """Notes which results the user does not see: those after the first `own` outputs."""
    seen = {o.index for o in program.outputs[:own] if o.kind in ("result", "number")}
    seen |= {result for _, result in program.writes}
    last = {o.index for o in program.outputs[own:] if o.kind == "result"}
    program.module.main.metadata["kept"] = sorted(last - seen)


def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """The min-cut partition, but random draws are kept: recomputing one would draw anew.

    Checkpointed regions ask to recompute all they hold; a dropout's mask is a byte an element.
    """
    rewrite_joint(joint)
    for node in joint.graph.nodes:
        source = node.args[0] if getattr(node.target, "__name__", "") == "getitem" else node
        tags = getattr(getattr(source, "target", None), "tags", ())
        if "recompute" in node.meta and torch.Tag.nondeterministic_seeded in tags:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return min_cut_rematerialization_partition(joint, inputs, **options)


class GraphCallable:
    """A compiled graph with the graph's own calling convention: tensors and sizes in, any out."""

    def __init__(self, program: Program, compile_module: Callable[[Module], Compiled]) -> None:
        self.program = program
        self._arguments = [(a.index, a.kind) for a in program.arguments]
        self._plain = all(a.kind == "tensor" for a in program.arguments)
        self._compiled = compile_module(program.module)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self._plain:
            flat = [args[i] for i, _ in self._arguments]
        else:
            flat = [_argument(kind, args[i]) for i, kind in self._arguments]
        with torch.no_grad():
            results = write_back(args, self._compiled(flat), self.program.writes)
        return tuple(self._output(o, results, args) for o in self.program.outputs)

    def _output(self, output: Output, results: Sequence[Tensor], args: Sequence[Any]) -> Any:
        match output.kind:
            case "result":
                return results[output.index]
            case "number":
                return results[output.index].item()
            case "input":
                return args[output.index]
            case "view":
                sizes, strides, offset = output.value
                size, stride = (tuple(self._number(n, args) for n in ns) for ns in (sizes, strides))
                return args[output.index].as_strided(size, stride, self._number(offset, args))
            case _:
                return output.value

    def _number(self, expr: Any, args: Sequence[Any]) -> int:
        """The value of an expression over torch's size symbols in this call."""
        if isinstance(expr, int):
            return expr
        values = {}
        for name in expr.free_symbols:
            i, axis = self.program.symbols[name]
            values[name] = args[i] if axis < 0 else args[i].shape[axis]
        return int(expr.subs(values))


def _argument(kind: str, value: Any) -> Tensor:
    if kind == "size":
        return torch.empty((value, 0), dtype=torch.int8)
    if kind == "number":
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    tensor: Tensor = value
    return tensor


class InferenceGraph:
    """A Dynamo graph without gradients, with its parameters frozen while they stay as they are.

    A parameter that was written in place (an optimizer step, `load_state_dict`) is noticed
    (`accel.frontends.frozen`); from then on parameters are arguments of the program, so that
    training between evaluations does not compile again and again.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Any],
        compile_module: Callable[[Module], Compiled],
        freeze: bool,
    ) -> None:
        self._graph, self._compile = graph, compile_module
        self._examples = [None if isinstance(x, Tensor) else x for x in inputs]
        program = import_dynamo_graph(graph, inputs, is_weight if freeze else lambda t: False)
        self._frozen = [Frozen(i, inputs[i]) for i in program.frozen]
        self._callable = GraphCallable(program, compile_module)
        self._written = [i for i, _ in program.writes]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        for frozen in self._frozen:
            if frozen.changed(args[frozen.index]):
                self._thaw()
                break
        if self._written and first_overlap(args, self._written) is not None:
            _log.warning("a tensor that the graph writes shares memory with another: run by torch")
            return tuple(self._graph(*args))
        return self._callable(*args)

    def _thaw(self) -> None:
        _log.info("parameters changed after compilation; they are arguments from now on")
        program = import_dynamo_graph(self._graph, self._examples, lambda t: False)
        self._callable = GraphCallable(program, self._compile)
        self._frozen = []
