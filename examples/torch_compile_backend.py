"""Use accel as a backend of `torch.compile`: no import needed, graph breaks and all.

python examples/torch_compile_backend.py
"""

import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).eval()
    fast = torch.compile(model, backend="accel", dynamic=True)

    with torch.no_grad():
        for batch in (2, 5, 16):  # one program for all batch sizes
            x = torch.randn(batch, 32)
            torch.testing.assert_close(fast(x), model(x))
            print(f"batch {batch}: same result")


if __name__ == "__main__":
    main()
