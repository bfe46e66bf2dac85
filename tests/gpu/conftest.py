"""An option for tests of engines."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", metavar="DIR", help="where engines of the shipped model are, or go")
