"""What tests of engines need: a GPU, TensorRT for those that build some, and an option."""

from __future__ import annotations

import importlib.util

import pytest

from moecompiler.errors import UserError
from moecompiler.runtime.device import Device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", metavar="DIR", help="where engines of the shipped model are, or go")


@pytest.fixture(scope="session")
def no_gpu() -> str | None:
    """Why there is none."""
    try:
        Device()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest, no_gpu: str | None) -> None:
    """Skips where there is no GPU, or no TensorRT for a test of it."""
    if no_gpu is not None:
        pytest.skip(no_gpu)
    if "tensorrt" in request.path.name and importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed")
