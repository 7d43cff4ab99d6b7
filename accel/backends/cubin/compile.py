"""One function's source -> cubin and PTX, by Triton.

Triton compiles functions of modules on disk, so a source is written to a private folder and
imported from there: it is text that this compiler made. Triton's own cache is not used: what is
made here is kept in accel's, with all that the runtime needs to know.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from accel.backends.cubin.pairs import paired
from accel.errors import BackendError, MissingDependencyError

PARAMETERS = 5  # of the compiled function, for each map: the map, two sizes, two strides
SHARED = "shared"  # in a map's type, where the source is Gluon's: the layout of a tile

_ALIGNMENT = 16  # of every pointer: what vector loads need
_SHARED_MAP = re.compile(
    rf"tensordesc<(?P<element>\w+)\[(?P<rows>\d+), (?P<columns>\d+)\],{SHARED}>"
)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)", re.S)
# Triton counts element types as the device does, the driver in another order.
_HOST_ELEMENT = {8: 10, 9: 8, 10: 9}


@dataclass(frozen=True)
class Unit:
    """One function to compile.

    Attributes:
        source: a module's text; name: the function in it.
        signature: Triton's types of its parameters, "constexpr" included.
        constants: values of those.
        arch: "sm_90".
        gluon: it is Gluon's, not Triton's.
    """

    source: str
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    warps: int
    arch: str
    gluon: bool = False


@dataclass(frozen=True)
class MapLayout:
    """What Triton has decided about a map.

    Attributes:
        box: rows and columns of one copy; a tile may take several.
        width: bytes of an element; element, swizzle: CUDA's numbers of the type and the pattern.
    """

    box: tuple[int, int]
    width: int
    element: int
    swizzle: int


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


def capability(arch: str) -> int:
    """sm_90 -> 90."""
    return int(arch.removeprefix("sm_").rstrip("a"))


def prepare() -> None:
    """Imports what compiling needs. Raises MissingDependencyError."""
    for name in ("triton.language", "triton.compiler", "triton.experimental.gluon._runtime"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # pragma: no cover - depends on the installation
            raise MissingDependencyError(
                "generated GPU kernels need triton", advice="pip install 'accel-compiler[triton]'"
            ) from error


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


def compile_unit(unit: Unit) -> Binary:
    """Machine code of a function. Raises BackendError with Triton's message if there is none."""
    prepare()
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = {
        (position,): [["tt.divisibility", _ALIGNMENT]]
        for position, (name, type_) in enumerate(unit.signature.items())
        if type_.startswith("*") and name != "status"
    }
    with loaded(unit.source, unit.name) as module:
        kind = GluonASTSource if unit.gluon else ASTSource
        types = {name: _with_layout(type_) for name, type_ in unit.signature.items()}
        function = kind(getattr(module, unit.name), types, dict(unit.constants), aligned)
        try:
            made, metadata = _run_stages(function, unit)
        except Exception as error:
            raise failure(unit, str(error)) from error
    ptx = str(made["ptx"])
    symbol = str(metadata["name"])
    own = sum(_count(t) for t in unit.signature.values())
    return Binary(
        symbol=symbol,
        cubin=bytes(made["cubin"]),
        ptx=ptx,
        warps=int(metadata["num_warps"]),
        shared=int(metadata["shared"]),
        spare=_parameters(ptx, symbol) - own,
        maps=_map_layouts(metadata.get("tensordesc_meta")),
    )


def failure(unit: Unit, reason: str) -> BackendError:
    """What is raised where Triton does not take a source."""
    return BackendError(f"Triton does not compile {unit.name}: {reason}\n{unit.source}")


def _run_stages(function: Any, unit: Unit) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each stage of Triton's compiler makes, and what they note on the way.

    `triton.compile` runs the same stages between looking into a cache of files and filling it.
    """
    from triton import knobs
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", capability(unit.arch), 32)
    backend = make_backend(target)
    given = {"num_warps": unit.warps, "enable_fp_fusion": True}
    if "enable_reflect_ftz" in _option_names():
        given["enable_reflect_ftz"] = False  # subnormal numbers are numbers, as in eager
    options = backend.parse_options({**given, **function.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, function.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(options)
    module = function.make_ir(target, options, generators, backend.get_module_map(), context)
    metadata: dict[str, Any] = {**options.__dict__, "target": target}
    made: dict[str, Any] = {}
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # of a file that is gone by then
        for name in list(stages)[list(stages).index(function.ext) :]:
            module = stages[name](module, metadata)
            made[name] = module = paired(module) if name == "ptx" else module
    return made, metadata


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


def _map_layouts(described: object) -> tuple[MapLayout, ...]:
    """From Triton's metadata (`tensordesc_meta`)."""
    found = described if isinstance(described, (list, tuple)) else ()
    return tuple(
        MapLayout(
            (int(one["block_size"][0]), int(one["block_size"][1])),
            int(one["elem_size"]),
            _HOST_ELEMENT.get(int(one["elem_type"]), int(one["elem_type"])),
            int(one["swizzle"]),
        )
        for one in found
    )
