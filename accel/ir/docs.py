"""Writes the reference page of all ops, `docs/ops.md`, from their definitions.

python -m accel.ir.docs > docs/ops.md
"""

from __future__ import annotations

import inspect
import sys

from accel.ir import ops
from accel.ir.op import Aten, AttributeSpec, Lit, OpDefinition, Trait, definitions

_HEAD = """# Ops

Made from the definitions in `accel/ir/ops/` by `python -m accel.ir.docs > docs/ops.md`; a test
keeps it current. How to add one: [adding_an_op.md](adding_an_op.md).

Operands in brackets are optional, `*` marks any number. *ATen form* is what runs the op without a
compiler (`op.aten_call()`): the overload, or how many there are by case. *Parts* says whether the
op has a decomposition into primitives (`builder.decompose(op)`).
"""


def ops_page() -> str:
    """The page's text."""
    families: dict[str, list[OpDefinition]] = {name: [] for name in ops.__all__}
    for d in definitions():
        families[d.group].append(d)
    parts = [_HEAD]
    for family in sorted(families):
        module = sys.modules[f"{ops.__name__}.{family}"]
        parts.append(f"## {family}\n\n{_first_paragraph(module.__doc__)}\n")
        parts.append("| op | meaning | traits | ATen form | parts |")
        parts.append("|---|---|---|---|---|")
        parts.extend(_row(d) for d in families[family])
        parts.append("")
    return "\n".join(parts)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _row(d: OpDefinition) -> str:
    meaning = " ".join(d.doc.split()).replace("|", "\\|")
    traits = " ".join(t.name.lower() for t in Trait if t.name and t in d.traits and t.value)
    traits = traits.replace(" composite", "").replace("composite", "")
    parts = "yes" if d.decompose is not None else ""
    return f"| `{_signature(d)}` | {meaning} | {traits} | {_aten(d)} | {parts} |"


def _signature(d: OpDefinition) -> str:
    """name(x, weight, [bias]) {stride, groups = 1}."""
    operands = []
    for o in d.operands:
        name = f"*{o.name}" if o.variadic else o.name
        operands.append(f"[{name}]" if o.optional else name)
    text = f"{d.name}({', '.join(operands)})"
    if d.attributes:
        text += f" {{{', '.join(map(_attribute, d.attributes))}}}"
    return text.replace("|", "\\|")


def _attribute(spec: AttributeSpec) -> str:
    if spec.default is inspect.Parameter.empty:
        return spec.name
    return f"{spec.name} = {spec.default!r}".replace("torch.", "")


def _aten(d: OpDefinition) -> str:
    if not d.calls:
        return ""
    if len(d.calls) > 1:
        return f"{len(d.calls)} overloads, by case"
    form: Aten = d.calls[0]
    literals = [a.value for a in form.args if isinstance(a, Lit)]
    name = f"`{form.overload}`"
    if literals:
        name += f" with {', '.join(map(repr, literals))}"
    return name + (", in some cases" if form.when is not None else "")


if __name__ == "__main__":
    sys.stdout.write(ops_page())
