"""Lowerings: promotion, composites, parts, fallbacks; samples of PyTorch's operator tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accel import tree
from accel.errors import CaptureError, InputError
from tests.frontends.support import assert_close, captured, check, copies, fallbacks

X = torch.linspace(-2, 2, 24).reshape(4, 6)
INTS = torch.arange(1, 7)


def test_integers_and_numbers_promote_as_in_torch() -> None:
    check(
        lambda x: (x // 2, x % 3, x / 2, x**2, x**-1.0, -x, x << 1, x > 2.5, x + 1.5, x.sum()), INTS
    )
    check(lambda x, i: (x * i, i - x, torch.where(x > 0, x, i), x + True), X[0], INTS)
    check(lambda x, d: (x + d, x * d.sum()), X, X.double())


def test_bool_arithmetic() -> None:
    check(lambda m: (m.any(), m.all(1), m.sum(), ~m, m & True, m ^ m, m * 2, m + 1.5), X > 0)


def test_sixteen_bits_and_a_scalar_round_once() -> None:
    """0.1 is not rounded to bfloat16 before it multiplies, as in torch's kernels."""
    program = check(lambda x: (x * 0.1, x + 1e-3, x * 0.5), X.to(torch.bfloat16), tolerance=0)
    casts = program.ops.count("cast")
    assert casts == 4, "two widened, and the exact 0.5 not"


def test_powers_are_what_torch_computes() -> None:
    program = check(lambda x: (x**2, x**3, x**0.5, x**-0.5, x**-1), X.abs() + 1, tolerance=0)
    assert "pow" not in program.ops


@pytest.mark.parametrize(
    "name, function",
    [
        ("attention", lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        ("layer_norm", lambda q: F.layer_norm(q, (8,))),
        ("rms_norm", lambda q: F.rms_norm(q, (8,), eps=1e-6)),
        ("group_norm", lambda q: F.group_norm(q, 2)),
        ("softmax", lambda q: q.softmax(-1)),
        ("log_softmax", lambda q: q.log_softmax(-1)),
        ("gelu", lambda q: F.gelu(q, approximate="tanh")),
        ("silu", lambda q: F.silu(q)),
        ("avg_pool", lambda q: F.avg_pool2d(q, 2)),
        ("max_pool", lambda q: F.max_pool2d(q, 2, padding=1)),
        ("upsample", lambda q: F.interpolate(q, scale_factor=2, mode="bilinear")),
    ],
)
def test_composites_stay_whole(name: str, function: Callable[[Tensor], Tensor]) -> None:
    program = check(function, torch.randn(2, 4, 6, 8))
    assert program.ops == [name, "return"]


@pytest.mark.parametrize(
    "model, x",
    [
        (nn.Conv1d(3, 4, 4, padding="same"), torch.randn(2, 3, 9)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(3, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), torch.randn(2, 3, 5, 5)),
        (nn.LSTM(6, 5, 2, batch_first=True), torch.randn(2, 3, 6)),
        (nn.GRU(6, 5, bidirectional=True), torch.randn(2, 3, 6)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)),
        (nn.InstanceNorm2d(3, affine=True), torch.randn(2, 3, 4, 4)),
        (nn.EmbeddingBag(5, 4, mode="mean"), torch.tensor([[1, 2], [3, 4]])),
        (nn.PixelShuffle(2), torch.randn(1, 8, 3, 3)),
        (nn.RReLU().eval(), torch.randn(4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_modules_without_fallbacks(model: nn.Module, x: Tensor) -> None:
    program = captured(model, x)
    with torch.no_grad():
        assert_close(program(x), model(x))
    assert not fallbacks(program.module)


def test_what_has_no_definition_is_visible() -> None:
    program = check(lambda x: torch.special.i0(x) + x.median(), X)
    assert fallbacks(program.module) == {"aten::i0": 1, "aten::median": 1}
    assert program.ops.count("aten") == 2


def test_complex_numbers_run_through_the_fallback() -> None:
    def function(x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x) * torch.exp(torch.complex(x, x))
        return torch.fft.ifft(spectrum).real

    program = check(function, X)
    assert set(fallbacks(program.module)) >= {"aten::fft_fft", "aten::exp", "aten::mul.Tensor"}


def test_einsum_and_losses_come_by_parts() -> None:
    program = check(lambda a, b: torch.einsum("bij,bkj->bik", a, b), *torch.randn(2, 3, 4, 5))
    assert "matmul" in program.ops and not fallbacks(program.module)
    target = torch.tensor([1, 2, 3, 0])
    program = check(lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1), X, target)
    assert not fallbacks(program.module)


# PyTorch's own samples ----------------------------------------------------------------------------

# Draws that are not torch's stream in the same order, ties, and memory that nobody set.
UNEQUAL = {
    "cauchy", "exponential", "geometric", "log_normal", "sort", "argsort", "empty", "empty_like",
    "new_empty", "new_empty_strided", "empty_strided", "empty_permuted",
    "nn.functional.dropout2d", "nn.functional.dropout3d", "nn.functional.alpha_dropout",
    "nn.functional.feature_alpha_dropout",
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype, part, step",
    [(torch.float32, 0, 6), (torch.float32, 1, 6), (torch.int64, 2, 12), (torch.bfloat16, 3, 12)],
    ids=str,
)
def test_samples_of_torch(dtype: torch.dtype, part: int, step: int) -> None:
    """Two samples of operators that take the dtype: equal to eager, or a typed refusal.

    `benchmarks/op_db.py` takes all of them, through the compiler.
    """
    pytest.importorskip("expecttest", reason="torch's operator samples need it")
    from torch.testing._internal.common_methods_invocations import op_db

    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    checked = refused = 0
    for op in op_db[part::step]:
        if (
            op.name in UNEQUAL
            or op.name.startswith("jiterator")
            or dtype not in op.supported_dtypes("cpu")
        ):
            continue
        samples = list(op.sample_inputs("cpu", dtype))
        for sample in {id(s): s for s in samples[:: max(len(samples) - 1, 1)]}.values():
            args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            outcome = compare(op.op, args, kwargs, tolerance, f"{op.name} {sample}")
            checked += outcome is True
            refused += outcome is False
    assert checked > 20 and checked > 3 * refused


def compare(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: float, label: str
) -> bool | None:
    """True: equal. False: refused with a typed error. None: not data, or eager fails as well."""
    try:
        torch.manual_seed(42)
        wanted = function(*copies(args), **kwargs)
        tree.flatten((wanted, args, kwargs))
    except (RuntimeError, InputError):
        return None
    try:
        program = captured(function, *args, **kwargs)
    except CaptureError as error:
        assert error.what and (error.where or "layout" in error.what), label
        return False
    torch.manual_seed(42)
    try:
        assert_close(program(*copies(args), **kwargs), wanted, tolerance)
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from error
    return True
