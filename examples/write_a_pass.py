"""Write a pass, let the compiler check its promise, and see a wrong one caught.

python examples/write_a_pass.py
accel opt program.mlir --load examples/write_a_pass.py --passes root_of_square --validate
"""

from dataclasses import dataclass
from typing import ClassVar

from accel.errors import ContractError
from accel.ir import Module, parse_module, print_module
from accel.ir.rewrite import Rewrite, RuleSet, op, rewrite, var
from accel.passes.base import EXACT, Context, Contract, Pass, register_pass
from accel.passes.manager import PassManager

PROGRAM = """
"accel.func"() ({
^bb0(%x: tensor<4x8xf32>):
  %square = "accel.mul"(%x, %x) : (tensor<4x8xf32>, tensor<4x8xf32>) -> tensor<4x8xf32>
  %root = "accel.sqrt"(%square) : (tensor<4x8xf32>) -> tensor<4x8xf32>
  "accel.return"(%root) : (tensor<4x8xf32>) -> ()
}) {sym_name = "main"} : () -> ()
"""

x = var("x")
ROOT_OF_SQUARE = op("sqrt", op("mul", x, x))


@register_pass
@dataclass
class RootOfSquare(Pass):
    """sqrt(x * x) -> |x|."""

    name: ClassVar[str] = "root_of_square"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rules = RuleSet([Rewrite("root_of_square", ROOT_OF_SQUARE, op("abs", x))])
        rewrite(module, rules, context)


@register_pass
@dataclass
class CarelessRootOfSquare(Pass):
    """sqrt(x * x) -> x, which is wrong below zero."""

    name: ClassVar[str] = "careless_root_of_square"
    contract: ClassVar[Contract] = EXACT

    def run(self, module: Module, context: Context) -> None:
        rewrite(module, RuleSet([Rewrite("drop_root", ROOT_OF_SQUARE, x)]), context)


def main() -> None:
    module = parse_module(PROGRAM)
    ledger = PassManager("root_of_square,dce", validate=True).run(module)
    print(print_module(module))
    print("rewrites:", ledger.rows[0].rewrites, "error:", ledger.rows[0].error)

    try:
        PassManager("careless_root_of_square", validate=True).run(parse_module(PROGRAM))
    except ContractError as error:
        print(f"\nthe careless pass is caught:\n{error}")
    else:
        raise AssertionError("a wrong pass went through")


if __name__ == "__main__":
    main()
