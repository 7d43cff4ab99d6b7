"""The reference page of ops is current, and every definition says what it means."""

from pathlib import Path

from accel.ir import definitions
from accel.ir.docs import ops_page

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"


def test_the_reference_page_is_current() -> None:
    assert PAGE.read_text() == ops_page(), "run: python -m accel.ir.docs > docs/ops.md"


def test_every_definition_is_on_the_page_and_documented() -> None:
    page = PAGE.read_text()
    for d in definitions():
        assert f"| `{d.name}(" in page, d.name
        assert d.doc, f"accel.{d.name} has no docstring"
