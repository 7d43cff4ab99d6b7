"""The shape of the house: who imports whom, and what no file of the product may do.

Imports are read from the source, so that nothing depends on what other tests have loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "accel"
FILES = sorted(PACKAGE.rglob("*.py"))

# Files at the root of the package: names, errors, settings. Anyone may import them.
BASE = {"", "config", "errors", "large_pages", "names", "tree", "writes"}
# What each part may import besides itself and BASE.
ALLOWED: dict[str, set[str]] = {
    "loading": {"runtime"},
    "ir": set(),
    "frontends": {"ir"},
    "passes": {"ir"},
    "backends": {"ir", "runtime"},
    "runtime": set(),
    "compiler": {"ir", "frontends", "passes", "backends", "runtime"},
    "cli": {"ir", "frontends", "passes", "backends", "runtime", "compiler"},
}
# Optional packages: these, and only these, may be imported inside a function.
OPTIONAL = {
    "gguf", "llvmlite", "onnx", "onnxruntime", "onnxscript", "tensorrt_rtx", "torch_mlir",
    "transformers", "triton", "tvm", "tvm_ffi",
}  # fmt: skip


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, whether inside a function) for each import that runs."""
    tree = ast.parse(path.read_text(), str(path))
    found: list[tuple[str, int, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                module = child.module or ""
                deeper = [f"{module}.{alias.name}" for alias in child.names]
                known = [d for d in deeper if module.startswith("accel") and is_module(d)]
                found.extend((name, child.lineno, inside) for name in known or [module])
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            walk(child, inside or function)

    walk(tree, False)
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part(path: Path) -> str:
    """The part of the house that a file belongs to; "" for files at the root."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else ""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    here = part(path)
    if here == "" and path.stem in ("__init__", "__main__", "loading"):  # the facade
        return
    allowed = {here} | BASE | ALLOWED.get(here, set())
    for module, line, _ in imports(path):
        names = module.split(".")
        if names[0] == "accel":
            target = names[1] if len(names) > 1 else ""
            assert target in allowed, f"{name_of(path)}:{line}: {here} imports {module}"


def test_every_part_has_a_rule() -> None:
    parts = {part(path) for path in FILES} - {""}
    assert parts == set(ALLOWED) - {"loading"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_inside_functions_are_optional_packages(path: Path) -> None:
    for module, line, inside in imports(path):
        if inside:
            assert module.split(".")[0] in OPTIONAL, f"{name_of(path)}:{line}: import {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_code_from_data_and_one_reader_of_the_environment(path: Path) -> None:
    tree = ast.parse(path.read_text(), str(path))
    for module, line, _ in imports(path):
        forbidden = module.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve")
        assert not forbidden, f"{name_of(path)}:{line}: imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            place = f"{name_of(path)}:{node.lineno}"
            assert node.func.id not in ("eval", "exec"), f"{place}: {node.func.id}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = f"{name_of(path)}:{node.lineno}"
            reads = node.value.id == "os" and node.attr in ("environ", "getenv", "putenv")
            assert not reads or path.name == "config.py", f"{place}: os.{node.attr}"
            loads = node.value.id == "torch" and node.attr == "load"
            assert not loads, f"{place}: torch.load reads pickles"


def test_the_runtime_imports_no_compiler() -> None:
    """In a new process: `accel.runtime` and all its modules, and nothing of the compiler."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if part(p) == "runtime"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "parts = {m.split('.')[1] for m in sys.modules if m.startswith('accel.')}\n"
        "print(sorted(parts & {'ir', 'passes', 'frontends', 'backends', 'compiler', 'cli'}))\n"
        "print('tvm' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "False False"], done.stdout + done.stderr


def test_importing_accel_does_not_import_torch() -> None:
    code = "import sys, accel, accel.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 450, f"{name_of(path)} has {len(lines)} lines"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines"
