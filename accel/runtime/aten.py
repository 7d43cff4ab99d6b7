"""ATen steps: which overload a name means, whether it may be called, and its arguments.

A plan names an operator of PyTorch ("aten::topk.default") and has templates for its arguments (see
`accel.runtime.plan.Step`). Names are looked up in torch's dispatcher and nowhere else: nothing is
imported, and no attribute of a Python object is followed that the dispatcher does not know. Only
operators that write none of their operands are taken. A plan from a file that nobody vouches for
may call ATen operators only, and none that reaches outside of its tensors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from accel.errors import ArtifactError
from accel.runtime.plan import FunctionPlan, dtype_of

_CPU = torch.device("cpu")
_NAME = re.compile(r"([A-Za-z_]\w*)::(\w+)(?:\.(\w+))?")

# Read or make files, or build tensors from indices that they do not check.
_REACHES_OUT = re.compile(r"from_file|save|.*_(coo|csr|csc|bsr|bsc|compressed)_tensor.*|_nested_.*")

# Composites whose schema promises nothing, that always return new memory. Others are taken to
# return a view of an operand, as `dropout`, `einsum` and `broadcast_tensors` may.
_NEW_MEMORY = re.compile(
    r"linear|bilinear|matmul|conv(_transpose)?[123]d|(log_)?softmax|(layer|group|instance|batch)_norm"
    r"|rms_norm|scaled_dot_product_attention|std|var|max_pool[123]d|embedding_bag|silu_backward"
    r"|pad_sequence|cross_entropy_loss|nll_loss(_nd)?|repeat_interleave|outer|kron|logsumexp"
)


def draws(plan: FunctionPlan) -> bool:
    """Whether a plan's results depend on random draws."""
    tag = torch.Tag.nondeterministic_seeded
    return any(tag in resolve(step.name).tags for step in plan.steps if step.kind == "aten")


@functools.cache
def resolve(name: str) -> torch._ops.OpOverload:
    """The overload called `name`: "namespace::operator" or "namespace::operator.overload".

    Raises ArtifactError if it is not registered in this process, or writes to an operand.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ArtifactError(f"'{name[:80]}' is no operator's name")
    namespace, base, overload = match.groups()
    overload = overload or "default"
    try:
        torch._C._dispatch_find_schema_or_throw(
            f"{namespace}::{base}", "" if overload == "default" else overload
        )
    except RuntimeError:
        advice = f"install torch {torch.__version__} or later, or compile again with this one"
        if namespace != "aten":
            advice = f"import the package that registers the operators of '{namespace}' first"
        raise ArtifactError(f"this process has no operator '{name}'", advice=advice) from None
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    if found._schema.is_mutable:
        raise ArtifactError(f"operator '{name}' writes to its operands")
    return found


def check_untrusted(name: str) -> None:
    """Raises ArtifactError for an operator that a plan without a trusted signature may not call."""
    base = resolve(name)._schema.name.removeprefix("aten::")
    if not name.startswith("aten::") or _REACHES_OUT.fullmatch(base):
        raise ArtifactError(
            f"operator '{name}' may be called by a trusted artifact only",
            advice="load it with trust=True if you know where it comes from",
        )


@functools.cache
def may_alias(name: str) -> bool:
    """Whether a result may be a view of an operand.

    PyTorch annotates the views of all operators with kernels of their own (functionalization needs
    it); composite ones may return a view without saying so.
    """
    schema = resolve(name)._schema
    if any(r.alias_info is not None for r in schema.returns):
        return True
    base = schema.name.partition("::")[2]
    if base == "_unsafe_view":
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        resolve(name).name(), "CompositeImplicitAutograd"
    )
    return composite and _NEW_MEMORY.fullmatch(base) is None


# A template is a constant, or a function of the call's values.
Getter = Callable[[list[Any]], Any]


class ArgumentReader:
    """Turns templates into constants and getters.

    `operand(i)` gives operand i of the step: (True, tensor or None) if it is the same in every
    call, else (False, its slot). `size` evaluates a size expression. `device` is where the plan
    runs: a plan says "cpu" for it.
    """

    def __init__(
        self,
        operand: Callable[[int], tuple[bool, Any]],
        size: Callable[[Any], int],
        device: torch.device = _CPU,
    ) -> None:
        self._operand, self._size, self._device = operand, size, device

    def read(self, template: Any, depth: int = 0) -> tuple[bool, Any]:
        """(True, constant) or (False, getter)."""
        if template is None or isinstance(template, (bool, int, float, str)):
            return True, template
        if not isinstance(template, dict) or len(template) != 1 or depth > 16:
            raise ArtifactError(f"bad argument template {str(template)[:80]}")
        ((kind, body),) = template.items()
        if kind == "operand":
            static, found = self._operand(_integer(body))
            return (True, found) if static else (False, _slot_getter(found))
        if kind == "list" and isinstance(body, list):
            return self._read_list([self.read(t, depth + 1) for t in body])
        return True, self._constant(kind, body)

    @staticmethod
    def _read_list(items: list[tuple[bool, Any]]) -> tuple[bool, Any]:
        if all(static for static, _ in items):
            return True, [value for _, value in items]
        getters = [_constant_getter(v) if static else v for static, v in items]
        return False, lambda values: [get(values) for get in getters]

    def _constant(self, kind: str, body: Any) -> Any:
        if kind == "size":
            return self._size(body)
        if kind == "complex" and isinstance(body, list) and len(body) == 2:
            parts = [self.read(p)[1] for p in body]
            return complex(*parts)
        if kind == "dtype" and isinstance(body, str):
            return dtype_of(body)
        if kind == "torch" and isinstance(body, str):
            found = getattr(torch, body, None) if body.isidentifier() else None
            if isinstance(found, (torch.layout, torch.memory_format)):
                return found
            if body == "cpu":
                return self._device
        raise ArtifactError(f"bad argument template {{'{kind}': {str(body)[:80]}}}")


def _integer(body: Any) -> int:
    if isinstance(body, bool) or not isinstance(body, int):
        raise ArtifactError(f"bad operand number {str(body)[:40]}")
    return body


def _slot_getter(slot: int) -> Getter:
    return lambda values: values[slot]


def _constant_getter(value: Any) -> Getter:
    return lambda values: value
