"""The torch.compile backend, over the reference interpreter as its compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

from accel import tree
from accel.frontends.dynamo import Compiled, interpret_module, make_backend
from accel.ir import Module, verify
from tests import zoo
from tests.frontends.support import assert_close, copies


class Recording:
    """A compiler that verifies, keeps what it was given, and interprets."""

    def __init__(self) -> None:
        self.modules: list[Module] = []
        self.options: list[Mapping[str, Any]] = []
        self.backend = make_backend(self)

    def __call__(
        self,
        module: Module,
        options: Mapping[str, Any],
        device: torch.device,
    ) -> Compiled:
        verify(module)
        self.modules.append(module)
        self.options.append(options)
        return interpret_module(module, options)

    def compile(self, function: Any, **options: Any) -> Any:
        return torch.compile(function, backend=self.backend, fullgraph=True, **options)

    def ops(self, index: int = 0) -> list[str]:
        return [op.name for op in self.modules[index].main.ops]


@pytest.fixture
def compiler() -> Iterator[Recording]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield Recording()
    torch._dynamo.reset()


def test_inference_graphs_keep_composites(compiler: Recording) -> None:
    row = zoo.find("bert")
    model, inputs = row.build(), row.make_inputs()
    fast = compiler.compile(model)
    with torch.no_grad():
        assert_close(fast(**inputs), model(**inputs), 1e-4)
    assert len(compiler.modules) == 1
    ops = compiler.ops()
    assert ops.count("linear") == 13 and ops.count("attention") == 2
    assert ops.count("layer_norm") == 5
    assert len(compiler.modules[0].main.args) == 2, "parameters are constants"


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe", "xlnet", "bart", "swin", "mamba"])
def test_models_equal_eager_in_one_graph(compiler: Recording, name: str) -> None:
    row = zoo.find(name)
    model, inputs = row.build(), row.make_inputs()
    fast = compiler.compile(model)
    with torch.no_grad():
        assert_close(fast(**inputs), model(**inputs), 1e-4)
    assert len(compiler.modules) == 1


GRADIENTS = ("llama", "gpt2", "opt", "bert", "albert", "vit", "resnet", "convnext", "clip", "ast")


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_eager(compiler: Recording, name: str) -> None:
    row = zoo.find(name)
    model, inputs = row.build(), row.make_inputs()
    wanted = gradients(model, model, inputs)
    got = gradients(compiler.compile(model), model, inputs)
    assert len(compiler.modules) == 2, "one forward, one backward"
    scale = max(float(g.abs().max()) for g in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * scale


def gradients(function: Any, model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    outputs, _ = tree.flatten(function(**inputs))
    loss = sum((t.float().pow(2).mean() for t in outputs if t.requires_grad), torch.tensor(0.0))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_backward_compiles_when_it_is_needed(compiler: Recording) -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    result = compiler.compile(model)(x)
    assert len(compiler.modules) == 1
    result.sum().backward()
    assert len(compiler.modules) == 2


def test_dynamic_sizes_compile_once(compiler: Recording) -> None:
    row = zoo.find("llama")
    model = row.build()
    fast = compiler.compile(model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 12), (3, 17), (5, 9)):
            inputs = row.make_inputs(batch, length)
            assert_close(fast(**inputs), model(**inputs), 1e-4)
    assert len(compiler.modules) == 1


def same(
    compiler: Recording,
    function: Callable[..., Any],
    *calls: tuple[Any, ...],
    tolerance: float = 1e-5,
    **options: Any,
) -> None:
    """Compiled and eager agree on results and on what they write, for each call in turn."""
    fast = compiler.compile(function, **options)
    for call in calls:
        theirs, ours = copies(call), copies(call)
        with torch.no_grad():
            torch.manual_seed(0)
            wanted = function(*theirs)
            torch.manual_seed(0)
            got = fast(*ours)
        assert_close(got, wanted, tolerance)
        assert_close(ours, theirs, tolerance)


def test_attention_over_any_number_of_tokens(compiler: Recording) -> None:
    def attend(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    fast = compiler.compile(attend, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 7):
            x = torch.randn(1, 2, tokens, 8)
            assert_close(fast(x), attend(x))


def test_inputs_are_written(compiler: Recording) -> None:
    def function(x: Tensor) -> Tensor:
        x[0].zero_()
        x.add_(1)
        return x.sum()

    same(compiler, function, (torch.randn(4, 6),))


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_of_inputs_share_their_memory(compiler: Recording, dynamic: bool) -> None:
    fast = compiler.compile(lambda x: (x.view(-1), x[1:].t(), x * 2, x), dynamic=dynamic)
    for rows in (4, 5) if dynamic else (4,):
        x = torch.randn(rows, 6)
        with torch.no_grad():
            flat, turned, double, itself = fast(x)
            assert itself is x
            flat[:] = 3
        assert torch.equal(x, torch.full((rows, 6), 3.0)) and torch.equal(turned, x[1:].t())
        assert not torch.equal(double, x * 2)
    assert len(compiler.modules) == 1


def test_numbers_are_arguments(compiler: Recording) -> None:
    x = torch.randn(8, 2)
    same(compiler, lambda x, n: x[:n] * n, (x, 2), (x, 3), (x, 5), dynamic=True)
    assert len(compiler.modules) == 1
    torch._dynamo.reset()
    same(compiler, lambda x, s: (x * s, s + 1), (x, 2.5), (x, -3.5), (x, 0.25), dynamic=True)


def test_sizes_are_results(compiler: Recording) -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x.reshape(-1)[: y.shape[0]], x.shape[0] * 2, x @ y.t()

    calls = [(torch.randn(n, 6), torch.randn(m, 6)) for n, m in ((3, 4), (5, 9), (2, 7))]
    same(compiler, function, *calls, dynamic=True)
    assert len(compiler.modules) == 1


def test_batch_norm_statistics_in_training(compiler: Recording) -> None:
    for grad in (False, True):
        torch._dynamo.reset()
        ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        fast = compiler.compile(ours)
        for _ in range(2):
            x = torch.randn(2, 3, 4, 4, requires_grad=grad)
            with torch.set_grad_enabled(grad):
                assert_close(fast(x), theirs(x))
        for name, buffer in theirs.named_buffers():
            assert_close(dict(ours.named_buffers())[name], buffer)


def test_dropout_in_training_has_one_mask_for_both_ways(compiler: Recording) -> None:
    x = torch.ones(100, 100, requires_grad=True)
    y = compiler.compile(lambda x: F.dropout(x * 2, 0.25))(x)
    y.sum().backward()
    kept = y != 0
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)
    assert torch.allclose(x.grad[kept], torch.tensor(2 / 0.75))


def test_checkpointing_draws_the_same_mask_again(compiler: Recording) -> None:
    linear = nn.Linear(6, 6)

    def block(x: Tensor) -> Tensor:
        return F.dropout(torch.relu(linear(x)), 0.5)

    fast = compiler.compile(lambda x: checkpoint(block, x, use_reentrant=False))
    x = torch.randn(4, 6, requires_grad=True)
    y = fast(x)
    y.sum().backward()
    assert linear.weight.grad is not None
    dead = (y == 0).all(0)
    assert torch.equal(linear.weight.grad[dead], torch.zeros_like(linear.weight.grad[dead]))
    with torch.no_grad():
        fast(torch.randn(4, 6))


def test_autocast(compiler: Recording) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (x @ w).float().softmax(-1)

    same(compiler, function, (torch.randn(4, 6), torch.randn(6, 5)), tolerance=1e-2)


def test_complex_tensors(compiler: Recording) -> None:
    same(compiler, lambda x: torch.fft.rfft(x).abs(), (torch.randn(4, 6),))
    same(compiler, lambda z: z * 2 + 1j, (torch.randn(3, dtype=torch.complex64),))


def test_own_autograd_functions(compiler: Recording) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            result: Tensor = grad * ctx.saved_tensors[0] * 3
            return result

    x = torch.randn(4, requires_grad=True)
    compiler.compile(lambda x: Scaled.apply(x) * 2)(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, x.detach() * 6)


def test_changed_parameters_are_noticed(compiler: Recording) -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    fast = compiler.compile(model)
    with torch.no_grad():
        assert_close(fast(x), model(x))
        model.weight.mul_(2)
        assert_close(fast(x), model(x))
        model.load_state_dict({"weight": torch.randn(2, 4), "bias": torch.randn(2)})
        assert_close(fast(x), model(x))
    assert len(compiler.modules) == 2, "once more, with parameters as arguments"
    assert len(compiler.modules[1].main.args) == 3


def through_data(model: nn.Linear) -> None:
    model.weight.data.mul_(2)


def through_a_view(model: nn.Linear) -> None:
    model.weight.data.view(-1)[::2] = 0


def through_numpy(model: nn.Linear) -> None:
    model.bias.detach().numpy()[:] = 1


def by_assignment(model: nn.Linear) -> None:
    model.weight.data = torch.ones_like(model.weight)


@pytest.mark.parametrize("outputs", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [through_data, through_a_view, through_numpy, by_assignment])
def test_writes_that_autograd_does_not_see(
    compiler: Recording, write: Any, outputs: int, dtype: torch.dtype
) -> None:
    model, x = nn.Linear(3, outputs, dtype=dtype), torch.randn(3, 3, dtype=dtype)
    fast = compiler.compile(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
            write(model)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-2, atol=1e-2)
    assert len(compiler.modules) == 2


def test_options(compiler: Recording) -> None:
    x = torch.randn(3, 4)
    fast = compiler.compile(nn.Linear(4, 2), options={"freeze": False, "passes": "quantize"})
    with torch.no_grad():
        fast(x)
    assert compiler.options == [{"passes": "quantize"}]
    assert len(compiler.modules[0].main.args) == 3
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="activation_memory_budget is 7"):
        compiler.compile(nn.Linear(4, 2), options={"activation_memory_budget": 7})(x)


def saved_bytes(compiler: Recording, budget: float) -> int:
    """Bytes of what the forward hands to the backward."""
    torch._dynamo.reset()
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32))]
    model = nn.Sequential(*layers)
    x = torch.randn(64, 32, requires_grad=True)
    options = {"activation_memory_budget": budget}
    compiler.compile(model, options=options)(x).sum().backward()
    backward = compiler.modules[-1].main
    return sum(int(a.type.nbytes()) for a in backward.args)


def test_a_memory_budget_keeps_fewer_activations(compiler: Recording) -> None:
    assert saved_bytes(compiler, 0.2) < 0.8 * saved_bytes(compiler, 1.0)


def test_control_flow_is_refused_with_its_place(compiler: Recording) -> None:
    def function(x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        return result

    with pytest.raises(BackendCompilerFailed, match=r"cond.*not supported[\s\S]*test_dynamo.py"):
        compiler.compile(function)(torch.randn(3))
