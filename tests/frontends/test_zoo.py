"""Whole models: the captured program computes what the model does.

A sample of the zoo, one or two architectures a family; `benchmarks/coverage.py` runs all of it.
"""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from tests.frontends.support import assert_close, captured, fallbacks

# Architectures, and the ATen ops that have no definition in the IR.
STATIC: dict[str, set[str]] = {
    "llama": set(),
    "gemma3": set(),
    "gpt_neo": set(),
    "falcon": set(),
    "mixtral": set(),
    "bert": set(),
    "deberta_v2": set(),
    "xlnet": set(),
    "fnet": {"aten::fft_fftn", "aten::real"},
    "t5": set(),
    "bart": set(),
    "swinv2": set(),
    "beit": set(),
    "resnet": set(),
    "segformer": set(),
    "efficientnet": set(),
    "clip": set(),
    "wav2vec2": set(),
    "mamba2": set(),
    "recurrent_gemma": set(),
}
DYNAMIC = ("llama", "gemma2", "mpt", "gpt2", "qwen2_moe", "roberta", "xlnet", "bart", "mamba2")


@pytest.mark.parametrize("name", STATIC)
def test_captured_model_equals_eager(name: str) -> None:
    row = zoo.find(name)
    model, inputs = row.build(), row.make_inputs()
    program = captured(model, **inputs)
    with torch.no_grad():
        assert_close(program(**inputs), model(**inputs), 1e-4)
        fresh = row.make_inputs(seed=7)
        assert_close(program(**fresh), model(**fresh), 1e-4)
    assert set(fallbacks(program.module)) == STATIC[name]


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_program_for_all_batches_and_lengths(name: str) -> None:
    row = zoo.find(name)
    model, inputs = row.build(), row.make_inputs()
    shapes = {
        key: {0: "batch", 1: "target" if key.startswith("decoder") else "length"} for key in inputs
    }
    program = captured(model, dynamic_shapes=shapes, **inputs)
    assert {"batch", "length"} <= program.main.symbols.keys()
    for batch, length in ((3, 17), (5, 9)):
        sized = row.make_inputs(batch, length)
        with torch.no_grad():
            assert_close(program(**sized), model(**sized), 1e-4)


def test_composites_stay_whole() -> None:
    row = zoo.find("bert")
    ops = captured(row.build(), **row.make_inputs()).ops
    for name, count in {
        "linear": 13,
        "layer_norm": 5,
        "attention": 2,
        "gelu": 2,
        "embedding": 3,
    }.items():
        assert ops.count(name) == count, name
    assert "matmul" not in ops


def test_every_op_has_a_place_in_the_model() -> None:
    row = zoo.find("llama")
    program = captured(row.build(), **row.make_inputs())
    for op in program.main.ops:
        if op.name not in ("return", "constant", "full"):
            assert op.location is not None and op.location.file.endswith(".py"), op
    linears = [op for op in program.main.ops if op.name == "linear"]
    assert linears[0].location is not None
    assert linears[0].location.scope == "model.layers.0.self_attn.q_proj"
    assert linears[0].location.file.endswith("modeling_llama.py")
