"""`accel inspect`: what is inside an artifact. Reads data only; runs nothing of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from accel.cli.output import Json, emit, emit_text, facts, format_bytes, table
from accel.errors import OptionError
from accel.names import near
from accel.runtime.analysis import analyze
from accel.runtime.artifact import Artifact
from accel.runtime.binding import Sizes
from accel.runtime.plan import FunctionPlan, SizeExpr, Step, ValueSpec
from accel.runtime.trust import trusted_keys

app = typer.Typer()

# Arenas are shown for dynamic sizes of this many elements.
_TYPICAL_SIZE = 256
_SHOWN = 3  # values of one type in a row that are listed each


@app.command()
def inspect(
    artifact: Annotated[Path, typer.Argument(help="An .accel file.")],
    ir: Annotated[str, typer.Option(help="Print the IR of this stage.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="List the steps of the plan.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="List generated kernels.")] = False,
    source: Annotated[str, typer.Option(help="Print the source of this kernel.")] = "",
    function: Annotated[str, typer.Option(help="Only this entry point.")] = "",
    as_json: Json = False,
) -> None:
    """Show what is inside an artifact: entry points, plan, kernels, IR."""
    with Artifact(artifact) as opened:
        if ir:
            text = opened.ir(ir)
            emit({"stage": ir, "ir": text}, True) if as_json else emit_text(text)
            return
        if source:
            text = read_source(opened, source)
            emit({"kernel": source, "source": text}, True) if as_json else emit_text(text)
            return
        plans = choose(opened.manifest.functions, function)
        data = describe(opened, plans)
        parts = summary(data)
        if plan:
            data["plan"] = {name: [step_facts(p, s) for s in p.steps] for name, p in plans.items()}
            parts += [steps_table(name, p) for name, p in plans.items()]
        if kernels:
            data["kernels"] = kernel_uses(opened, plans)
            rows = [
                (k["name"], k["calls"], format_bytes(k["source_bytes"])) for k in data["kernels"]
            ]
            parts.append(table("generated kernels", ("kernel", ">calls", ">source"), rows))
        emit(data, as_json, *parts)


def choose(plans: dict[str, FunctionPlan], name: str) -> dict[str, FunctionPlan]:
    if not name:
        return plans
    if name not in plans:
        raise OptionError(f"no entry point named '{name}'", advice=near(name, plans))
    return {name: plans[name]}


def describe(opened: Artifact, plans: dict[str, FunctionPlan]) -> dict[str, Any]:
    """The artifact as JSON-able facts."""
    manifest = opened.manifest
    sizes: Counter[str] = Counter()
    for name, blob in manifest.blobs.items():
        sizes[name.partition("/")[0].partition(".")[0]] += blob.bytes
    signed = opened.signature
    return {
        "file": str(opened.archive.path),
        "bytes": opened.archive.path.stat().st_size,
        "format": manifest.format,
        "target": manifest.target.name,
        "machine": manifest.target.machine,
        "versions": manifest.versions,
        "host_code": manifest.host_code,
        "signer": signed.key if signed else None,
        "trusted": signed.key in trusted_keys() if signed else None,
        "stages": opened.stages(),
        "golden": len(manifest.golden),
        "weights": len(manifest.weights),
        "content_bytes": dict(sorted(sizes.items())),
        "functions": {name: function_facts(p) for name, p in plans.items()},
    }


def function_facts(plan: FunctionPlan) -> dict[str, Any]:
    steps = Counter(step.kind for step in plan.steps)
    libraries = Counter(step.name for step in plan.steps if step.kind == "library")
    fallbacks = Counter(step.name for step in plan.steps if step.kind == "aten")
    kernels = Counter(step.name for step in plan.steps if step.kind == "kernel")
    return {
        "inputs": [value_facts(plan.values[v]) for v in plan.inputs],
        "outputs": [value_facts(plan.values[v]) for v in plan.outputs],
        "arena": arena_facts(plan),
        "symbols": {name: list(limits) for name, limits in plan.symbols.items()},
        "steps": dict(steps),
        "libraries": dict(libraries.most_common()),
        "kernels": len(kernels),
        "fallbacks": dict(sorted(fallbacks.items())),
    }


def arena_facts(plan: FunctionPlan) -> dict[str, Any]:
    """The planned arena for typical sizes: `_TYPICAL_SIZE` where a size's range allows it."""
    sizes = {
        name: max(low, _TYPICAL_SIZE if high is None else min(high, _TYPICAL_SIZE))
        for name, (low, high) in plan.symbols.items()
    }
    placement = Sizes(plan, analyze(plan)).bind(sizes).placement
    return {"bytes": placement.total, "least_bytes": placement.lower_bound, "sizes": sizes}


def value_facts(value: ValueSpec) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": value.shape}


def summary(data: dict[str, Any]) -> list[Any]:
    """The overview for a person."""
    trust = {True: "by a key you trust", False: "by a key you do not trust", None: "no"}
    contents = ", ".join(f"{k} {format_bytes(n)}" for k, n in data["content_bytes"].items())
    rows = [
        ("file", f"{data['file']} ({format_bytes(data['bytes'])})"),
        ("contents", contents),
        ("target", f"{data['target']} {data['machine']}".strip()),
        ("versions", ", ".join(f"{k} {v}" for k, v in data["versions"].items())),
        ("host code", data["host_code"] or "none"),
        ("signed", trust[data["trusted"]]),
        ("IR stages", ", ".join(data["stages"]) or "none"),
        ("golden vectors", data["golden"]),
    ]
    parts: list[Any] = [facts(rows)]
    for name, f in data["functions"].items():
        sizes = ", ".join(
            f"{s} in {low}..{'' if high is None else high}"
            for s, (low, high) in f["symbols"].items()
        )
        lines = [
            ("inputs", signature(f["inputs"])),
            ("outputs", signature(f["outputs"])),
            ("sizes", sizes or "fixed"),
            ("arena", arena_text(f["arena"])),
            ("steps", counts(f["steps"])),
            ("libraries", counts(f["libraries"]) or "none"),
            ("kernels", f"{f['kernels']} different"),
            ("run by torch", counts(f["fallbacks"]) or "nothing"),
        ]
        parts += ["", f"[bold]@{name}[/bold]", facts(lines)]
    return parts


def arena_text(arena: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} = {n}" for name, n in arena["sizes"].items())
    least = f" (no plan needs less than {format_bytes(arena['least_bytes'])})"
    return format_bytes(arena["bytes"]) + (f" for {sizes}" if sizes else "") + least


def counts(found: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in found.items())


def signature(values: list[dict[str, Any]]) -> str:
    """Names and types; a run of values of one type, as a language model's caches are, is one."""
    runs: list[tuple[str, list[str]]] = []
    for v in values:
        type_ = f"{v['dtype']}\\[{', '.join(map(size_text, v['shape']))}]"
        if runs and runs[-1][0] == type_:
            runs[-1][1].append(v["name"])
        else:
            runs.append((type_, [v["name"]]))
    return ", ".join(part for type_, names in runs for part in _run(type_, names))


def _run(type_: str, names: list[str]) -> list[str]:
    if len(names) <= _SHOWN:
        return [f"{name}: " * bool(name) + type_ for name in names]
    named = f"{names[0]} ... {names[-1]}: " if names[0] and names[-1] else ""
    return [f"{named}{len(names)} x {type_}"]


def size_text(size: SizeExpr) -> str:
    """A size expression of a plan as a person writes it."""
    if isinstance(size, list):
        operator, *rest = size
        texts = [size_text(s) for s in rest]
        if operator in ("max", "min"):
            return f"{operator}({', '.join(texts)})"
        return "(" + f" {operator} ".join(texts) + ")"
    return str(size)


def step_facts(plan: FunctionPlan, step: Step) -> dict[str, Any]:
    def types(numbers: list[int]) -> list[str]:
        return ["-" if n < 0 else f"%{n}" for n in numbers]

    return {
        "kind": step.kind,
        "name": step.name,
        "inputs": types(step.inputs),
        "outputs": types(step.outputs),
        "types": [value_type(plan.values[n]) for n in step.outputs],
        "source": step.source,
    }


def value_type(value: ValueSpec) -> str:
    return f"{value.dtype}[{', '.join(map(size_text, value.shape))}]"


def steps_table(name: str, plan: FunctionPlan) -> Any:
    rows = []
    for i, step in enumerate(plan.steps):
        f = step_facts(plan, step)
        inputs = [
            plan.values[n].name or f"%{n}" if n >= 0 and plan.values[n].kind == "weight" else text
            for n, text in zip(step.inputs, f["inputs"])
        ]
        made = " ".join(f"{o} {t}".replace("[", "\\[") for o, t in zip(f["outputs"], f["types"]))
        rows.append((i, f["kind"], f["name"], " ".join(inputs), made, f["source"]))
    return table(f"plan of @{name}", (">#", "kind", "name", "inputs", "outputs", "source"), rows)


def kernel_uses(opened: Artifact, plans: dict[str, FunctionPlan]) -> list[dict[str, Any]]:
    """Generated kernels, the most called first."""
    calls = Counter(s.name for p in plans.values() for s in p.steps if s.kind == "kernel")
    sources = source_files(opened)
    return [
        {
            "name": name,
            "calls": n,
            "source_bytes": opened.manifest.blobs[sources[name]].bytes if name in sources else 0,
        }
        for name, n in calls.most_common()
    ]


def source_files(opened: Artifact) -> dict[str, str]:
    """Kernel name -> file of its source."""
    files = [n for n in opened.manifest.blobs if n.startswith("kernels/")]
    code = opened.manifest.host_code
    return {n.removeprefix("kernels/").partition(".")[0]: n for n in files if n != code}


def read_source(opened: Artifact, name: str) -> str:
    sources = source_files(opened)
    if name not in sources:
        raise OptionError(f"no kernel named '{name}'", advice=near(name, sources))
    return opened.read(sources[name]).decode()
