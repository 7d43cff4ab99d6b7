"""Classifiers and other models that read few rows of their last block, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import accel

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
IMAGE = {"image_size": 32, "patch_size": 8}  # 16 patches
Made = tuple[nn.Module, Callable[[int, int], Tensor]]  # and inputs for a batch and a length


def pixels(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 90, (batch, length))


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=7, **SMALL, **IMAGE)), pixels


def deit() -> Made:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    model = DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=7, **SMALL, **IMAGE))
    return model, pixels


def bert() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=90, **SMALL)), ids


def roberta() -> Made:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=90, max_position_embeddings=40, **SMALL)
    return RobertaForSequenceClassification(config), ids


class LastToken(nn.Module):
    """A language model's scores of what comes next."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=90, num_key_value_heads=2, **SMALL)
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.model(ids, use_cache=False, logits_to_keep=1).logits
        return scores


def llama() -> Made:
    return LastToken(), ids


MODELS: dict[str, Callable[[], Made]] = {f.__name__: f for f in (vit, deit, bert, roberta, llama)}


def scores(result: Any) -> Tensor:
    made: Tensor = result if isinstance(result, Tensor) else result["logits"]
    return made


def distance(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    x = inputs(batch, 12)
    with torch.no_grad():
        fast = accel.compile(model, inputs=(x,))
        (row,) = (r for r in fast.program.ledger.rows if r.name == "hoist_slices")
        assert row.rewrites, "the last block is computed of the rows that are read"
        for given in (x, inputs(batch, 12)):
            assert distance(scores(fast(given)), scores(model(given))) < 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_any_batch_and_length(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    sizes = ({0: Dim("batch", max=64), 1: Dim("length", max=32)},)
    with torch.no_grad():
        fast = accel.compile(model, inputs=(inputs(3, 12),), dynamic_shapes=sizes)
        for batch, length in ((3, 12), (2, 31), (5, 2), (1, 7), (4, 1), (1, 1)):
            x = inputs(batch, length)
            assert distance(scores(fast(x)), scores(model(x))) < 1e-5, (batch, length)


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str) -> None:
    """Loss and gradients through torch.compile; nothing reads the rows that are not computed."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()  # without dropout
    x = inputs(3, 12)
    grads = []
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="accel")):
        model.zero_grad(set_to_none=True)
        scores(run(x)).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    eager, made = grads
    assert eager.keys() == made.keys() and eager
    largest = max(float(g.abs().max()) for g in eager.values())
    for key, grad in eager.items():
        assert float((made[key] - grad).abs().max()) < 1e-5 * largest, key
