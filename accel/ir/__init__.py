"""The IR: types, ops, modules, text, verifier, interpreter. Start at `accel.ir.module`."""

from accel.ir import ops
from accel.ir.builder import Builder
from accel.ir.interpret import interpret
from accel.ir.module import Function, Location, Module, Op, Region, SymbolInfo, Value
from accel.ir.op import OpDefinition, Trait, definition, definitions
from accel.ir.parser import parse_module
from accel.ir.printer import print_function, print_module, print_op
from accel.ir.storage import WeightStore
from accel.ir.types import TensorType, symbol
from accel.ir.verify import verify, verify_function

__all__ = [
    "Builder",
    "Function",
    "Location",
    "Module",
    "Op",
    "OpDefinition",
    "Region",
    "SymbolInfo",
    "TensorType",
    "Trait",
    "Value",
    "WeightStore",
    "definition",
    "definitions",
    "interpret",
    "ops",
    "parse_module",
    "print_function",
    "print_module",
    "print_op",
    "symbol",
    "verify",
    "verify_function",
]
