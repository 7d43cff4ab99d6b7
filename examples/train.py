"""Train through accel: forward and backward are both compiled.

python examples/train.py
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn


def losses(
    model: Callable[..., torch.Tensor], parameters: Iterable[nn.Parameter], steps: int
) -> list[float]:
    """Trains on a small regression problem; the loss before each step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 16, generator=generator)
    y = (x @ torch.randn(16, 1, generator=generator)).tanh()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 1))
    twin = copy.deepcopy(model)
    plain = losses(twin, twin.parameters(), steps=20)
    fast = torch.compile(model, backend="accel")
    compiled = losses(fast, model.parameters(), steps=20)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    print(f"loss {compiled[0]:.4f} -> {compiled[-1]:.4f}, as without the compiler")


if __name__ == "__main__":
    main()
