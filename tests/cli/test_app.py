"""The command line as a whole: help, errors, exit codes, lists."""

from __future__ import annotations

from pathlib import Path

import pytest

import accel.errors
from accel import __version__
from accel.cli.app import VERBS, load_verb
from accel.cli.output import format_bytes, format_seconds
from accel.compiler.cache import CompileCache
from accel.errors import AccelError
from accel.ir import definitions
from accel.passes.registry import load_passes
from tests.cli.support import ROOT, Run, run_process

CLI_PAGE = (ROOT / "docs" / "cli.md").read_text()


def error_classes() -> list[type[AccelError]]:
    found = [c for c in vars(accel.errors).values() if isinstance(c, type)]
    return [c for c in found if issubclass(c, AccelError)]


def test_help_lists_every_verb_and_version() -> None:
    ran = run_process("--help")
    assert ran.code == 0 and all(verb in ran.out for verb in VERBS)
    assert run_process("--version").out == f"accel {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_a_section_in_the_docs(accel: Run, verb: str) -> None:
    ran = accel(verb, "--help")
    assert ran.code == 0
    command = load_verb(verb)
    commands = getattr(command, "commands", None)
    for each in (commands or {verb: command}).values():
        assert "as_json" in [p.name for p in each.params], f"{verb} has no --json"
    assert f"`accel {verb}" in CLI_PAGE


def test_unknown_verbs_and_options(accel: Run) -> None:
    ran = accel("complie")
    assert ran.code == 2 and "complie" in ran.err and "[ACCEL001]" in ran.err
    assert accel("opt", "--no-such-option").code == 2
    error = accel("ops", "--no-such-option", "--json").json["error"]
    assert error["exit_code"] == 2 and "--no-such-option" in error["what"]


def test_exit_codes_differ_by_cause_and_are_documented() -> None:
    for cls in error_classes():
        row = f"| {cls.exit_code} |"
        assert any(
            line.startswith(row) and cls.__name__ in line for line in CLI_PAGE.splitlines()
        ), f"docs/cli.md has no row '{row} ... {cls.__name__}'"
        assert cls.exit_code != 0
    ids = [cls.id for cls in error_classes()]
    assert len(set(ids)) == len(ids)


def test_passes_lists_all_registered_passes(accel: Run) -> None:
    listed = {p["name"]: p for p in accel("passes", "--json").json}
    assert set(listed) == set(load_passes())
    assert listed["quantize"]["contract"].startswith("relative_error")
    assert listed["cse"]["contract"] == "exact"
    detail = accel("passes", "quantize")
    assert detail.code == 0 and "bits" in detail.out
    assert accel("passes", "quantise").code == 2


def test_ops_lists_all_definitions(accel: Run) -> None:
    listed = {d["name"]: d for d in accel("ops", "--json").json}
    assert set(listed) == {d.name for d in definitions()}
    assert listed["softmax"]["signature"] == "(x) {axis}"
    assert "accel.softmax" in accel("ops", "softmax").out
    assert accel("ops", "sofmax").code == 2


def test_targets(accel: Run) -> None:
    data = accel("targets", "--json").json
    assert data["cpu"]["kind"] == "cpu" and data["h100"]["arch"] == "sm_90"


def test_cache_info_and_clear(accel: Run, tmp_path: Path) -> None:
    cache = CompileCache()
    assert tmp_path in cache.folder.parents
    cache.put("k" * 64, {}, b"payload")
    info = accel("cache", "info", "--json").json
    assert info["entries"] == 1 and info["bytes"] > 7
    assert accel("cache", "clear", "--yes").code == 0
    assert accel("cache", "info", "--json").json["entries"] == 0


def test_units() -> None:
    assert [format_bytes(n) for n in (0, 1536, 3 << 30)] == ["0 B", "1.5 KiB", "3.0 GiB"]
    assert [format_seconds(s) for s in (2, 0.5, 2e-5)] == ["2.00 s", "500.00 ms", "20.0 us"]
