"""Fixtures that tests of several files share. What is slow to make is made once in a test run, whatever its processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from programs import Passage, Programs, Subject


def pytest_collection_finish() -> None:
    _silence_torch_trace()


def pytest_runtest_protocol() -> None:
    _silence_torch_trace()


def _silence_torch_trace() -> None:
    """pytest adds its handlers to loggers that do not propagate. torch's trace does not, and once it has a handler it is written,
    which takes several times as long as an export itself."""
    logging.getLogger("torch.__trace").propagate = True


# torch is imported only by the tests that want it: the others should start at once


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The exported and optimized programs; see ``programs.Programs``."""
    import torch
    from programs import Programs

    torch.set_num_threads(1)  # ranks are threads, and test processes share the machine
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    directory.mkdir(exist_ok=True)
    return Programs(directory)


@pytest.fixture(scope="session")
def shipped() -> Subject:
    """The trained model in ``tests/data``."""
    from programs import shipped_subject

    return shipped_subject()


@pytest.fixture(scope="session")
def passage() -> Passage:
    """Real text for the trained model."""
    from programs import text_passage

    return text_passage()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser, for tests that are marked ``browsing.needs_browser``."""
    from browsing import PATH
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        # without its sandbox, which root may not use: the only pages are our own
        started = tools.chromium.launch(executable_path=PATH, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()
