"""The parts of docs/benchmarks.md about coverage: architectures, and operator samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUESTIONS = ("accel", "inductor", "dynamic", "gradients")


def coverage_lines(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row a family, then a row a model."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for model in models.values():
        families.setdefault(model["family"], []).append(model)
    head = ["family", "models", "accel", "Inductor", "dynamic sizes", "gradients"]
    lines = _table(head)
    for name, members in [*families.items(), ("**all**", list(models.values()))]:
        cells = [name, str(len(members)), *(_rate(members, q) for q in QUESTIONS)]
        lines.append("| " + " | ".join(cells) + " |")
    head = ["model", "error", "compile s", "Inductor error", "Inductor s", "programs for 3 sizes",
            "gradient error", "run by torch"]  # fmt: skip
    lines += ["", *_table(head)]
    for name, model in models.items():
        own, other = model.get("accel", {}), model.get("inductor", {})
        cells = [
            name, _error(own), str(own.get("seconds", "")), _error(other),
            str(other.get("seconds", "")), _programs(model.get("dynamic")),
            _error(model.get("gradients", {})), _fallbacks(model),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _table(head: list[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]


def _rate(members: list[Mapping[str, Any]], question: str) -> str:
    known = [m[question] for m in members if "ok" in m.get(question, ())]
    return f"{sum(bool(k['ok']) for k in known)} of {len(known)}" if known else ""


def _error(outcome: Mapping[str, Any]) -> str:
    if "eager_fails" in outcome:
        return "eager has none"
    if "error_message" in outcome:
        return f"fails: {outcome['error_message'].split(':')[0]}"
    if "error" not in outcome:
        return ""
    breaks = outcome.get("graph_breaks", 0)
    return f"{outcome['error']:.1e}" + (f", {breaks} graph breaks" if breaks else "")


def _programs(outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return ""
    if "programs" not in outcome:
        return _error(outcome)
    graphs = outcome.get("dynamo_graphs")
    return str(outcome["programs"]) + (f" (Dynamo: {graphs})" if graphs else "")


def _fallbacks(model: Mapping[str, Any]) -> str:
    forward = [f"`{n.removeprefix('aten::')}`" for n in model.get("fallbacks", {})]
    backward = model.get("gradients", {}).get("fallbacks", {})
    more = [f"`{n.removeprefix('aten::')}`" for n in backward if n not in model["fallbacks"]]
    return ", ".join(forward) + (f" (training: {', '.join(more)})" if more else "")


def op_db_lines(dtypes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A row a dtype; then what is refused, by reason, and what torch runs."""
    outcomes = ["right", "right, torch", "refused", "eager fails", "wrong", "crashed"]
    lines = _table(["dtype", "operators", "samples", *outcomes])
    for dtype, stored in dtypes.items():
        counts = stored["total"]
        cells = [dtype, str(len(stored["rows"])), str(sum(counts.values()))]
        cells += [str(counts.get(outcome, 0)) for outcome in outcomes]
        lines.append("| " + " | ".join(cells) + " |")
    reasons: dict[str, list[str]] = {}
    torch_runs: set[str] = set()
    for stored in dtypes.values():
        for name, row in stored["rows"].items():
            for reason in row.get("refused", ()):
                reasons.setdefault(reason, []).append(name)
            for names in row.get("right, torch", ()):
                torch_runs |= {n.removeprefix("aten::") for n in names.split(", ")}
    lines += ["", "Refused, by reason:", ""]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(set(item[1]))):
        unique = sorted(set(names))
        shown = ", ".join(f"`{n}`" for n in unique[:12]) + (", ..." if len(unique) > 12 else "")
        lines.append(f"- {reason.replace('<', '&lt;')}: {len(unique)} operators ({shown})")
    listed = ", ".join(f"`{n}`" for n in sorted(torch_runs))
    return [*lines, "", f"Run by torch ({len(torch_runs)} overloads): {listed}."]
