"""Constants, terminators, kernels, vendor calls and the visible ATen fallback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.errors import TypeInferenceError
from accel.ir.op import Arg, Attribute, Trait, aten, define, resolve_overload
from accel.ir.types import Shape, TensorType, value_dtype


@define("constant", Trait.PURE | Trait.CONSTANT | Trait.OPAQUE)
class Constant:
    """A tensor of the module's weight store. The result type is the stored one's."""

    infer = None

    @staticmethod
    def evaluate(*, name: str) -> Tensor:
        raise NotImplementedError("the interpreter reads the weight store")


@define("full", Trait.PURE | Trait.CONSTANT)
class Full:
    """A tensor with one value everywhere; a scalar when `shape` is empty."""

    @staticmethod
    def infer(
        *, value: bool | int | float | complex, dtype: torch.dtype, shape: Shape = ()
    ) -> TensorType:
        if isinstance(value, complex) and not dtype.is_complex:
            raise TypeInferenceError(f"accel.full: {value} as {dtype}")
        return TensorType(shape, dtype)

    evaluate = aten("full", "shape", "value", dtype=Arg(lambda v: value_dtype(v["dtype"])))


@define("return", Trait.TERMINATOR)
class Return:
    """Ends a function: its operands are the results."""

    @staticmethod
    def infer(*values: TensorType) -> tuple[TensorType, ...]:
        return ()


@define("yield", Trait.TERMINATOR)
class Yield:
    """Ends any other region: its operands are the region's results."""

    @staticmethod
    def infer(*values: TensorType) -> tuple[TensorType, ...]:
        return ()


@define("kernel", Trait.PURE | Trait.OPAQUE)
class Kernel:
    """One generated kernel. The region holds its meaning in tensor-level ops.

    `backend` names the code generator, `kind` the template (pointwise, reduction, ...), and
    `options` are the template's choices as (name, value) pairs.
    """

    infer = None

    @staticmethod
    def evaluate(
        *inputs: Tensor, backend: str, kind: str, options: Attribute = ()
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError("the interpreter runs the region")


@define("call", Trait.PURE | Trait.OPAQUE)
class Call:
    """One call of a vendor library, e.g. `library = "onednn.linear"`.

    The region holds the meaning in tensor-level ops (linear + gelu + add, say), so the interpreter,
    the verifier and the cost model need to know nothing of libraries. `options` are the library's
    parameters as (name, value) pairs.
    """

    infer = None

    @staticmethod
    def evaluate(*inputs: Tensor, library: str, options: Attribute = ()) -> tuple[Tensor, ...]:
        raise NotImplementedError("the interpreter runs the region")


@define("scan", Trait.PURE | Trait.OPAQUE)
class Scan:
    """A loop over the tokens: the region runs once for each, in order.

    Operands, which are the region's arguments: `carries` values that go from token to token, first
    ones; then one value for each entry of `axes`, of which the region gets one token's part (size
    1 along that axis); then what no token changes. The region yields the next carries, and parts
    of size 1 along `stacks`. Results: the last carries, and all tokens' parts side by side.
    """

    infer = None

    @staticmethod
    def evaluate(
        *inputs: Tensor, carries: int, axes: tuple[int, ...], stacks: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError("the interpreter runs the region")


@define("aten", Trait.OPAQUE)
class AtenFallback:
    """An ATen op without a definition: typed by FakeTensor, run by torch, shown in every report.

    `args` is the positional argument template and `kwargs` (name, template) pairs, where
    ("operand", i) stands for operand i and ("list", ...) for a list of templates; anything else is
    a literal. `pure` says whether the op may be removed when unused. Results that are None in ATen
    are left out.
    """

    infer = None

    @staticmethod
    def evaluate(
        *inputs: Tensor,
        name: str,
        args: tuple[Any, ...],
        kwargs: tuple[Any, ...] = (),
        pure: bool = True,
    ) -> tuple[Tensor, ...]:
        function = resolve_overload(name)

        def fill(template: Any) -> Any:
            if isinstance(template, tuple) and template and template[0] == "operand":
                return inputs[template[1]]
            if isinstance(template, tuple) and template and template[0] == "list":
                return [fill(t) for t in template[1:]]
            return template

        positional = [fill(a) for a in args]
        named = {k: fill(v) for k, v in kwargs}
        result = function(*positional, **named)
        made = result if isinstance(result, (tuple, list)) else (result,)
        return tuple(r for r in made if r is not None)
