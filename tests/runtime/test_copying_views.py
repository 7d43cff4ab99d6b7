"""A reshape that cannot be a view copies, and must copy in every call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import accel


class Repeat(nn.Module):
    """Repeats heads as grouped attention does: expand, then a reshape that copies."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = (x * 2).sin()
        return self.out(heads[:, :, None].expand(1, 3, 2, 6, 4).reshape(1, 6, 6, 4))


def test_a_repeated_buffer_is_read_anew_in_each_call() -> None:
    torch.manual_seed(0)
    model = Repeat().eval()
    compiled = accel.compile(model, inputs=(torch.zeros(1, 3, 6, 4),), options={"cache": False})
    for _ in range(3):
        x = torch.randn(1, 3, 6, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
