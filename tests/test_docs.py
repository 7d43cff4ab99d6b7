"""Generated documentation is up to date, and what the pages say exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from accel.cli.app import VERBS
from accel.ir import parse_module
from accel.passes.pipeline import parse_pipeline
from accel.passes.registry import load_passes
from benchmarks import docs_table
from benchmarks.measure import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_generated_pages_are_up_to_date() -> None:
    """In a process of its own: other tests register passes."""
    command = [sys.executable, "-m", "benchmarks.docs_table", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


PRELUDE = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)).eval()
x = torch.randn(2, 16)
"""


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    """All blocks, one after the other, in a new process."""
    blocks = re.findall(r"```python\n(.*?)```", docs_table.README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    script = tmp_path / "readme.py"
    script.write_text(PRELUDE + "\n".join(blocks))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout and (tmp_path / "m.accel").is_file()


def commands(text: str) -> list[str]:
    """Verbs of `accel VERB` in code: spans, and lines of blocks that start with it."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    return re.findall(r"`accel ([a-z]+)", text) + re.findall(r"^accel ([a-z]+)", blocks, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_programs_parse_and_verbs_and_pipelines_exist(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"```mlir\n(\"accel\.func.*?)```", text, re.DOTALL):
        parse_module(block, page.name)
    for verb in commands(text):
        assert verb in VERBS, f"{page.name}: accel {verb}"
    load_passes()
    for pipeline in re.findall(r'--passes "([^"]+)"|"passes": "([^"]+)"', text):
        parse_pipeline("".join(pipeline))
