"""quantize: fires, near misses, and the same numbers as torch's own quantizers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accel.errors import OptionError
from accel.ir import parse_module, print_module
from accel.passes.quantize import Quantize, nf4_codebook
from accel.passes.sparsify import Sparsify
from tests.passes.compression.programs import (
    Program,
    apply,
    decoded_weight,
    linear_program,
    random,
    run,
)

BEFORE = """
"builtin.module"() ({
  "accel.func"() ({
  ^bb0(%x: tensor<3x128xf32>):
    %w = "accel.constant"() {name = "fc.weight"} : () -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (tensor<3x128xf32>, tensor<64x128xf32>) -> tensor<3x64xf32>
    "accel.return"(%y) : (tensor<3x64xf32>) -> ()
  }) {sym_name = "main"} : () -> ()
}) : () -> ()
"""
AFTER_INT8 = """
"builtin.module"() ({
  "accel.func"() ({
  ^bb0(%x: tensor<3x128xf32>):
    %q = "accel.constant"() {name = "fc.weight.q"} : () -> tensor<64x128xi8>
    %s = "accel.constant"() {name = "fc.weight.scale"} : () -> tensor<64x1xf32>
    %w = "accel.dequantize"(%q, %s) {axis = 1 : i64}
      : (tensor<64x128xi8>, tensor<64x1xf32>) -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (tensor<3x128xf32>, tensor<64x128xf32>) -> tensor<3x64xf32>
    "accel.return"(%y) : (tensor<3x64xf32>) -> ()
  }) {sym_name = "main"} : () -> ()
}) : () -> ()
"""
AFTER_INT4 = """
"builtin.module"() ({
  "accel.func"() ({
  ^bb0(%x: tensor<3x128xf32>):
    %q = "accel.constant"() {name = "fc.weight.q"} : () -> tensor<64x128xui4>
    %s = "accel.constant"() {name = "fc.weight.scale"} : () -> tensor<64x2xf32>
    %z = "accel.constant"() {name = "fc.weight.zero"} : () -> tensor<64x2xui4>
    %w = "accel.dequantize"(%q, %s, %z) {axis = 1 : i64, group = 64 : i64}
      : (tensor<64x128xui4>, tensor<64x2xf32>, tensor<64x2xui4>) -> tensor<64x128xf32>
    %y = "accel.linear"(%x, %w) : (tensor<3x128xf32>, tensor<64x128xf32>) -> tensor<3x64xf32>
    "accel.return"(%y) : (tensor<3x64xf32>) -> ()
  }) {sym_name = "main"} : () -> ()
}) : () -> ()
"""


def shape_of_text(text: str) -> list[str]:
    """The program without the names of its values."""
    names: dict[str, str] = {}
    lines = []
    for line in print_module(parse_module(text)).splitlines():
        tokens = []
        for token in line.replace("(", " ( ").replace(")", " ) ").replace(",", " , ").split():
            if token.startswith("%"):
                head = token.rstrip(":")
                token = names.setdefault(head, f"%{len(names)}")
            tokens.append(token)
        lines.append(" ".join(tokens))
    return lines


@pytest.mark.parametrize(
    ("options", "after"),
    [({}, AFTER_INT8), ({"bits": 4, "group": 64, "symmetric": False}, AFTER_INT4)],
)
def test_before_and_after_text(options: dict, after: str) -> None:
    module = parse_module(BEFORE)
    module.weights.add("fc.weight", random(64, 128))
    outcome = apply(module, Quantize(**options))
    assert outcome.rewrites == ["quantize"]
    assert shape_of_text(outcome.text) == shape_of_text(after)


def torch_rounding(weight: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """torch's fake quantization, a channel for each group."""
    grouped = weight.reshape(-1, group or weight.shape[1])
    if symmetric:
        high = 2 ** (bits - 1) - 1
        scale = grouped.abs().amax(1) / high
        zero, low = torch.zeros_like(scale, dtype=torch.int32), -high
    else:
        high, low = 2**bits - 1, 0
        bottom, top = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
        scale = (top - bottom) / high
        zero = (-bottom / scale).round().to(torch.int32)
    made = torch.fake_quantize_per_channel_affine(grouped, scale, zero, 0, low, high)
    return made.reshape(weight.shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integers_match_torchs_fake_quantization(bits: int, symmetric: bool, seed: int) -> None:
    rows, group, groups = 5 + seed, (0, 4, 6, 8)[seed], 3
    columns = group * groups or 12
    weight = random(rows, columns, seed=seed) + 0.3
    module = linear_program(weight, rows=columns)
    apply(module, Quantize(bits=bits, group=group, symmetric=symmetric))
    wanted = torch_rounding(weight, bits, group, symmetric)
    # torch multiplies by 1 / scale where this divides: a tie may fall to the other side.
    step = weight.abs().max() * 2 / (2**bits - 1)
    made = decoded_weight(module)
    assert (made - wanted).abs().max() <= step * 1.001
    assert ((made - wanted).abs() > 1e-5).float().mean() < 0.02


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_on_the_grid_are_met_exactly_and_packed(bits: int, symmetric: bool) -> None:
    high = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low = -high if symmetric else 0
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randint(low, high + 1, (6, 16), generator=generator)
    levels[:, 0], levels[:, 8] = high, high
    levels[:, 1], levels[:, 9] = low, low
    weight = (levels - (0 if symmetric else 2 ** (bits - 1))) * 0.25
    module = linear_program(weight, rows=16)
    outcome = apply(module, Quantize(bits=bits, group=8, symmetric=symmetric))
    assert torch.equal(decoded_weight(module), weight)
    stored = module.weights.stored("fc.weight.q")
    assert stored.element_size() == 1 and stored.numel() == 6 * 16 * bits // 8
    zeros = 0 if symmetric else module.weights.stored("fc.weight.zero").numel()
    assert outcome.notes["bytes_after"] == stored.numel() + 6 * 2 * 4 + zeros
    assert outcome.notes["bytes_before"] == 6 * 16 * 4
    assert outcome.notes["weights"][0]["error"] == 0


def test_float_zero_points_meet_any_4_bit_grid() -> None:
    generator = torch.Generator().manual_seed(3)
    levels = torch.randint(0, 16, (8, 2, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    weight = (levels * 0.125 + random(8, 2, 1, seed=5)).reshape(8, 64)
    module = linear_program(weight, rows=64)
    apply(module, Quantize(bits=4, group=32, symmetric=False, zero_point="float"))
    torch.testing.assert_close(decoded_weight(module), weight, rtol=0, atol=2e-6)


def test_fp8_matches_torchs_cast() -> None:
    weight = random(6, 16)
    module = linear_program(weight, rows=16)
    apply(module, Quantize(format="fp8"))
    scale = weight.abs().amax(1, keepdim=True) / 448
    wanted = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(decoded_weight(module), wanted)


def test_nf4_codebook_has_the_published_values() -> None:
    published = [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ]  # fmt: skip
    wanted = torch.tensor(published, dtype=torch.float64)
    torch.testing.assert_close(nf4_codebook(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("group", [0, 8])
def test_nf4_takes_the_nearest_value(group: int) -> None:
    weight = random(6, 16)
    module = linear_program(weight, rows=16)
    outcome = apply(module, Quantize(format="nf4", group=group))
    grouped = weight.reshape(-1, group or 16)
    scale = grouped.abs().amax(1, keepdim=True)
    book = nf4_codebook().float()
    nearest = ((grouped / scale).unsqueeze(-1) - book).abs().argmin(-1)
    wanted = (book[nearest] * scale).reshape(weight.shape)
    assert torch.equal(decoded_weight(module), wanted)
    assert outcome.ops().count("gather") == 1


def test_one_scale_for_a_tensor() -> None:
    weight = random(6, 16)
    module = linear_program(weight, rows=16)
    apply(module, Quantize(per="tensor"))
    wanted = torch.fake_quantize_per_tensor_affine(weight, weight.abs().max() / 127, 0, -127, 127)
    torch.testing.assert_close(decoded_weight(module), wanted)
    assert module.weights.type("fc.weight.scale").shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_have_the_weights_dtype(dtype: torch.dtype) -> None:
    weight = random(4, 8, dtype=dtype)
    module = linear_program(weight, rows=8)
    outcome = apply(module, Quantize())
    assert module.weights.type("fc.weight.scale").dtype == dtype
    assert outcome.notes["weights"][0]["error"] < 0.01


def test_zero_groups_and_constant_groups() -> None:
    weight = torch.zeros(2, 8)
    weight[1] = 3.0
    for options in ({}, {"bits": 4, "symmetric": False, "zero_point": "float"}, {"format": "nf4"}):
        module = linear_program(weight, rows=8)
        apply(module, Quantize(**options))
        assert torch.equal(decoded_weight(module), weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_have_one_scale_for_each_output_channel(groups: int) -> None:
    weight, image = random(8, 4 // groups, 3, 3), random(1, 4, 6, 6, seed=1)
    p = Program()
    x = p.input(1, 4, 6, 6)
    w = p.weight("conv.weight", weight)
    module = p.done(p.b.conv(x, w, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=groups))
    outcome = apply(module, Quantize())
    assert outcome.module.weights.type("conv.weight.scale").shape == (8, 1)
    wanted = torch_rounding(weight.reshape(8, -1), 8, 0, True).reshape(weight.shape)
    made = run(module, image)
    torch.testing.assert_close(made, F.conv2d(image, wanted, padding=1, groups=groups))


def test_matmul_weights_are_grouped_along_their_inputs() -> None:
    weight = random(12, 5)
    p = Program()
    x = p.input(12, 12)
    module = p.done(p.b.matmul(x, p.weight("w", weight)))
    apply(module, Quantize(group=4))
    assert module.weights.type("w.q").shape == (5, 12)
    made = run(module, torch.eye(12))
    torch.testing.assert_close(made, torch_rounding(weight.T.contiguous(), 8, 4, True).T)


def test_a_group_that_does_not_divide_the_inputs_is_a_near_miss() -> None:
    outcome = apply(linear_program(random(4, 12)), Quantize(bits=4, group=8))
    assert outcome.rewrites == [] and outcome.ops() == ["constant", "linear", "return"]
    assert "12 inputs are no multiple of group = 8" in outcome.misses[0]


def test_quantized_weights_are_not_quantized_again() -> None:
    module = linear_program(random(4, 8))
    apply(module, Quantize())
    assert apply(module, Quantize(bits=4)).rewrites == []


def test_values_of_a_sparse_weight_are_quantized() -> None:
    weight = random(4, 16)
    module = linear_program(weight, rows=16)
    outcome = apply(module, Sparsify(), Quantize(bits=4, group=4))
    assert outcome.ops().count("dequantize") == outcome.ops().count("unpack_n_of_m") == 1
    kept = weight.reshape(4, 4, 4)
    order = kept.abs().topk(2, -1).indices.sort(-1).values
    values = torch_rounding(kept.gather(-1, order).reshape(4, 8), 4, 4, True)
    wanted = torch.zeros(4, 4, 4).scatter(-1, order, values.reshape(4, 4, 2)).reshape(4, 16)
    torch.testing.assert_close(decoded_weight(module), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 5},
        {"format": "int3"},
        {"format": "nf4", "bits": 8},
        {"group": -1},
        {"group": 32, "per": "tensor"},
        {"symmetric": False, "format": "fp8"},
        {"zero_point": "middle"},
    ],
)
def test_bad_options_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError):
        Quantize(**options)
