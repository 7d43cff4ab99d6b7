"""Package a model into one file, and run the file in a process without the compiler.

python examples/package_and_load.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import accel

RUN = """
import sys, torch, accel
program = accel.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(program(x), sys.argv[3])
compiler = [m for m in sys.modules if m.startswith(("accel.compiler", "accel.ir", "accel.passes"))]
print("compiler modules imported:", len(compiler))
"""


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "model.accel"
        batch = Dim("batch", min=1, max=64)
        example = torch.randn(4, 32)
        accel.package(model, (example,), path=path, dynamic_shapes=({0: batch},))
        print(f"{path.name}: {path.stat().st_size} bytes")

        x = torch.randn(7, 32)  # another batch size than the example's
        torch.save(x, folder / "x.pt")
        files = [str(path), str(folder / "x.pt"), str(folder / "y.pt")]
        subprocess.run([sys.executable, "-c", RUN, *files], check=True)
        y = torch.load(folder / "y.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x))
    print("same result in another process")


if __name__ == "__main__":
    main()
