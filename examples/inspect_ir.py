"""Look at a program as it goes through the compiler: IR text, what each pass did, kernels.

python examples/inspect_ir.py
"""

import torch
from torch import nn

import accel


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Softmax(-1)).eval()
    x = torch.randn(4, 16)
    fast = accel.compile(model, inputs=(x,))
    for stage in ("captured", "optimized", "kernels"):
        print(f"// -- {stage} " + "-" * 60)
        print(fast.ir(stage))
    print(fast.explain())


if __name__ == "__main__":
    main()
