"""Every example runs, in a process of its own, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
SAYS = {
    "compile.py": "same results: scores [8, 10], features [8, 256]",
    "torch_compile_backend.py": "batch 16: same result",
    "train.py": "as without the compiler",
    "package_and_load.py": "compiler modules imported: 0\nsame result in another process",
    "inspect_ir.py": "accel.kernel",
    "write_a_pass.py": "the careless pass is caught",
}
# Not run as they are: the demo takes minutes (`make demo`), and generate.py is run by it.
LONG = {"__init__.py", "demo.py", "generate.py"}


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout


def test_every_example_is_listed() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SAYS) | LONG
