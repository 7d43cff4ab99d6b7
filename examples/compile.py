"""Compile a model: a callable with the model's own signature, and a report of what was done.

python examples/compile.py
"""

import torch
from torch import nn

import accel


class Classifier(nn.Module):
    """x [B, 64] -> class scores [B, 10], and the hidden features on request."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 10)
        self.norm = nn.LayerNorm(256)

    def forward(self, x: torch.Tensor, *, features: bool = False) -> dict[str, torch.Tensor]:
        hidden = self.norm(nn.functional.gelu(self.up(x)))
        result = {"scores": self.down(hidden).log_softmax(-1)}
        return {**result, "features": hidden} if features else result


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    fast = accel.compile(model)  # captures at the first call

    x = torch.randn(8, 64)
    with torch.no_grad():
        expected = model(x, features=True)
        got = fast(x, features=True)  # the same arguments, the same structure of results
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor)
    print("same results:", ", ".join(f"{k} {list(t.shape)}" for k, t in got.items()))
    print(fast.report())


if __name__ == "__main__":
    main()
