"""Which weights the compression passes find, select, share, and refuse."""

from __future__ import annotations

import pytest
import torch

from accel.errors import OptionError
from accel.ir import Location
from accel.passes.quantize import Quantize
from accel.passes.weights import MatrixForm, find_weights
from tests.passes.compression.programs import Program, apply, linear_program, random, run


def test_linear_matmul_and_conv_weights_are_found_with_their_contracted_axes() -> None:
    p = Program()
    x, image = p.input(2, 3, 8), p.input(1, 4, 6, 6)
    y = p.b.linear(x, p.weight("linear", random(8, 8)))
    y = p.b.matmul(y, p.weight("matmul", random(8, 5)))
    y = p.b.matmul(p.weight("left", random(7, 3)), y)
    attributes = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    z = p.b.conv(image, p.weight("conv", random(8, 4, 3, 3)), **attributes)
    z = p.b.conv_transpose(
        z, p.weight("transposed", random(8, 2, 3, 3)), output_padding=(0, 0), **attributes
    )
    found = {site.name: site.contracted for site in find_weights(p.done(y, z))}
    assert found == {
        "linear": (1,),
        "matmul": (0,),
        "left": (1,),
        "conv": (1, 2, 3),
        "transposed": (0, 2, 3),
    }


def test_a_weight_is_found_through_permutes_and_reshapes() -> None:
    p = Program()
    x = p.input(2, 6)
    transposed = p.b.permute(p.weight("a", random(6, 4)), axes=(1, 0))
    heads = p.b.reshape(p.weight("b", random(2, 2, 6)), shape=(4, 6))
    module = p.done(p.b.linear(x, transposed), p.b.linear(x, heads))
    found = {site.name: site.contracted for site in find_weights(module)}
    assert found == {"a": (0,), "b": (2,)}


def test_a_reshape_that_mixes_inputs_and_outputs_is_no_weight_path() -> None:
    p = Program()
    x = p.input(2, 6)
    mixed = p.b.reshape(p.weight("w", random(6, 4)), shape=(4, 6))
    (site,) = find_weights(p.done(p.b.linear(x, mixed)))
    assert site.uses == [] and [op.name for op in site.others] == ["linear"]


def test_integers_vectors_and_inputs_are_not_weights() -> None:
    p = Program()
    x = p.input(2, 6)
    p.weight("table", torch.zeros(4, 4, dtype=torch.int64))
    module = p.done(p.b.linear(x, p.input(4, 6), p.weight("bias", random(4))))
    assert find_weights(module) == []


@pytest.mark.parametrize("contracted", [(1,), (0,), (1, 2), (0, 2)])
def test_matrix_form_returns_the_tensor(contracted: tuple[int, ...]) -> None:
    tensor = random(4, 6, 2)
    form = MatrixForm((4, 6, 2), contracted)
    matrix = form.to_matrix(tensor)
    assert matrix.shape == (form.rows, form.columns)
    p = Program()
    module = p.done(form.from_matrix(p.b, p.weight("m", matrix.contiguous())))
    assert torch.equal(run(module), tensor)


def test_skip_and_only_look_at_weight_names_and_reader_scopes() -> None:
    p = Program()
    x = p.input(2, 6)
    p.b.location = Location("model.py", 3, "model.lm_head")
    y = p.b.linear(x, p.weight("tied.weight", random(6, 6)))
    p.b.location = Location("model.py", 4, "model.layers.0.fc")
    module = p.done(p.b.linear(y, p.weight("fc.weight", random(6, 6))))
    skipped = apply(module.clone(), Quantize(skip="lm_head"))
    assert [r["weight"] for r in skipped.notes["weights"]] == ["fc.weight"]
    only = apply(module.clone(), Quantize(only=r"^tied"))
    assert [r["weight"] for r in only.notes["weights"]] == ["tied.weight"]


@pytest.mark.parametrize("options", [{"skip": "("}, {"only": "["}, {"tied": "maybe"}])
def test_bad_selection_options_are_option_errors(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Quantize(**options)


def tied_program() -> Program:
    """Logits of a tied embedding: the table is looked up, and is the output projection too."""
    p = Program()
    tokens = p.input(2, 5, dtype=torch.int64)
    table = p.weight("embed.weight", random(16, 8))
    p.done(p.b.linear(p.b.embedding(table, tokens), table))
    return p


def test_a_tied_table_stays_by_default_and_says_so() -> None:
    outcome = apply(tied_program().module, Quantize())
    assert outcome.rewrites == []
    assert "also read by accel.embedding" in outcome.misses[0]
    assert "tied=share" in outcome.misses[0]


def test_a_shared_table_is_stored_once_and_decoded_after_the_lookup() -> None:
    p = tied_program()
    tokens = torch.randint(0, 16, (2, 5), generator=torch.Generator().manual_seed(1))
    outcome = apply(p.module, Quantize(tied="share"))
    assert outcome.module.weights.names() == ["embed.weight.q", "embed.weight.scale"]
    assert [n for n in outcome.ops() if n not in ("constant", "return")] == [
        "dequantize", "embedding", "embedding", "dequantize", "linear",
    ]  # fmt: skip
    q = outcome.module.weights.tensor("embed.weight.q")
    table = q.float() * outcome.module.weights.tensor("embed.weight.scale")
    wanted = torch.nn.functional.linear(torch.nn.functional.embedding(tokens, table), table)
    assert torch.equal(run(outcome.module, tokens), wanted)


def test_a_split_table_keeps_the_dense_one_for_the_lookup() -> None:
    p = tied_program()
    dense = p.module.weights.tensor("embed.weight")
    outcome = apply(p.module, Quantize(tied="split"))
    assert set(outcome.module.weights.names()) == {
        "embed.weight", "embed.weight.q", "embed.weight.scale",
    }  # fmt: skip
    lookup = next(op for op in outcome.module.main.ops if op.name == "embedding")
    assert lookup.operands[0].op.name == "constant"
    assert torch.equal(outcome.module.weights.tensor("embed.weight"), dense)


@pytest.mark.parametrize("grouped", [{}, {"group": 4}, {"format": "nf4", "group": 4}])
def test_embeddings_are_encoded_on_request_only(grouped: dict) -> None:
    def program() -> Program:
        p = Program()
        tokens = p.input(3, dtype=torch.int64)
        p.done(p.b.embedding(p.weight("table", random(10, 8)), tokens))
        return p

    assert apply(program().module, Quantize(**grouped)).rewrites == []
    tokens = torch.tensor([9, 0, 4])
    outcome = apply(program().module, Quantize(embeddings=True, **grouped))
    assert outcome.rewrites == ["quantize"]
    everything = apply(linear_program(random(10, 8), rows=8), Quantize(**grouped)).module
    table = run(everything, torch.eye(8)).T
    assert torch.equal(run(outcome.module, tokens), table[tokens])


def test_a_weight_of_two_functions_is_stored_once() -> None:
    p = Program("prefill")
    p.done(p.b.linear(p.input(5, 8), p.weight("w", random(4, 8))))
    decode = Program("decode", p.module)
    decode.done(decode.b.linear(decode.input(1, 8), decode.weight("w")))
    outcome = apply(p.module, Quantize())
    assert outcome.rewrites == ["quantize"]
    assert outcome.module.weights.names() == ["w.q", "w.scale"]
    assert "dequantize" in outcome.ops("prefill") and "dequantize" in outcome.ops("decode")


def test_fuel_stops_between_weights() -> None:
    p = Program()
    x = p.input(2, 6)
    for i in range(4):
        x = p.b.linear(x, p.weight(f"w{i}", random(6, 6, seed=i)))
    outcome = apply(p.done(x), Quantize(), fuel=2)
    assert [r["weight"] for r in outcome.notes["weights"]] == ["w0", "w1"]
    assert {"w2", "w3"} <= set(outcome.module.weights.names())


def test_an_unknown_contraction_of_a_weight_is_a_near_miss() -> None:
    p = Program()
    q = p.input(1, 2, 3, 4)
    key = p.weight("keys", random(1, 2, 5, 4))
    outcome = apply(p.done(p.b.attention(q, key, key, scale=1.0)), Quantize())
    assert outcome.rewrites == [] and "no plain weight" in outcome.misses[0]


def test_infinite_weights_are_refused() -> None:
    weight = random(4, 4)
    weight[1, 2] = float("inf")
    outcome = apply(linear_program(weight), Quantize())
    assert outcome.rewrites == [] and "infinities" in outcome.misses[0]
