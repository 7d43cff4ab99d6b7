"""The only door to Triton: source text -> cubin and PTX. No GPU is needed.

Triton compiles functions of modules on disk, so a source is written to a private folder and
imported from there: it is text that this compiler made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from accel.backends.triton.maps import PARAMETERS, SHARED, MapLayout, map_layouts
from accel.errors import BackendError, MissingDependencyError

_ALIGNMENT = 16  # of every pointer: what vector loads need
_SHARED_MAP = re.compile(
    rf"tensordesc<(?P<element>\w+)\[(?P<rows>\d+), (?P<columns>\d+)\],{SHARED}>"
)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)", re.S)


@dataclass(frozen=True)
class Binary:
    """One compiled function.

    Attributes:
        symbol: its name in the cubin.
        shared: bytes of dynamic shared memory.
        spare: parameters after the source's own, that Triton adds for scratch memory it does not
            need here; they get null.
        warps: of a program, those included that Triton adds for work of their own.
        maps: how the matrices that it copies lie in shared memory.
    """

    symbol: str
    cubin: bytes
    ptx: str
    warps: int
    shared: int
    spare: int
    maps: tuple[MapLayout, ...] = ()


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:  # pragma: no cover - depends on the installation
        raise MissingDependencyError(
            "generated GPU kernels need triton", advice="pip install 'accel-compiler[triton]'"
        ) from error
    return triton


def version() -> str:
    """What machine code depends on besides the program: Triton, this generator, ops' meaning."""
    try:
        number = metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            "generated GPU kernels need triton", advice="pip install 'accel-compiler[triton]'"
        ) from error
    return f"triton {number}, generator {_sources()}"


@cache
def _sources() -> str:
    """A hash over the generators and the IR, so that no cache entry outlives a change."""
    folder = Path(__file__).parent.parent
    hasher = hashlib.sha256()
    for part in (folder / "triton", folder / "loops", folder.parent / "ir"):
        for file in sorted(part.rglob("*.py")):
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]


def capability(arch: str) -> int:
    """sm_90 -> 90."""
    return int(arch.removeprefix("sm_").rstrip("a"))


@contextmanager
def loaded(source: str, name: str) -> Iterator[ModuleType]:
    """The source as a module."""
    with tempfile.TemporaryDirectory(prefix="accel-triton-") as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        label = f"accel_generated_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
        spec = importlib.util.spec_from_file_location(label, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[label]


def compile_source(
    source: str,
    name: str,
    signature: Mapping[str, str],
    constants: Mapping[str, int],
    warps: int,
    arch: str,
    *,
    gluon: bool = False,
) -> Binary:
    """Machine code of the function `name`, Triton's or Gluon's, for an architecture ("sm_90").

    Raises BackendError with Triton's message if it does not compile.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = {
        (position,): [["tt.divisibility", _ALIGNMENT]]
        for position, type_ in enumerate(signature.values())
        if type_.startswith("*") and list(signature)[position] != "status"
    }
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if "enable_reflect_ftz" in _option_names():
        options["enable_reflect_ftz"] = False  # subnormal numbers are numbers, as in eager
    with loaded(source, name) as module:
        kind = GluonASTSource if gluon else ASTSource
        types = {name: _with_layout(type_) for name, type_ in signature.items()}
        unit = kind(getattr(module, name), types, dict(constants), aligned)
        target = GPUTarget("cuda", capability(arch), 32)
        try:
            made = triton.compile(unit, target=target, options=options)
        except Exception as error:
            raise BackendError(f"Triton does not compile {name}: {error}\n{source}") from error
    ptx = str(made.asm["ptx"])
    metadata = made.metadata
    own = sum(_count(t) for t in signature.values())
    return Binary(
        symbol=str(metadata.name),
        cubin=bytes(made.asm["cubin"]),
        ptx=ptx,
        warps=int(metadata.num_warps),
        shared=int(metadata.shared),
        spare=_parameters(ptx, str(metadata.name)) - own,
        maps=map_layouts(getattr(metadata, "tensordesc_meta", None)),
    )


def _with_layout(type_: str) -> str:
    """A parameter's type; where Gluon names the layout of a matrix's tiles, its name for it."""
    found = _SHARED_MAP.fullmatch(type_)
    if found is None:
        return type_
    from triton.experimental.gluon import language

    element = {"fp16": language.float16, "bf16": language.bfloat16, "fp32": language.float32}
    box = [int(found["rows"]), int(found["columns"])]
    layout = language.NVMMASharedLayout.get_default_for(box, element[found["element"]])
    return f"tensordesc<{found['element']}[{box[0]}, {box[1]}],{layout!r}>"


def _count(type_: str) -> int:
    """Parameters of the compiled function for one of the source."""
    if type_ == "constexpr":
        return 0
    return PARAMETERS if type_.startswith("tensordesc") else 1


@cache
def _option_names() -> frozenset[str]:
    """Compile options of the installed Triton."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return frozenset(f.name for f in dataclasses.fields(CUDAOptions))


def _parameters(ptx: str, symbol: str) -> int:
    for name, parameters in _ENTRY.findall(ptx):
        if name == symbol:
            return int(parameters.count(".param"))
    raise BackendError(f"Triton's PTX has no entry {symbol}")
