"""Options of the backends' tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triton-seeds",
        default="60",
        help="how many random regions run through Triton's interpreter",
    )
