"""A fake GPU with the shipped model's engine, for tests of sessions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moecompiler.config import ExportOptions
from moecompiler.mapping import Mapping
from moecompiler.runtime import device

if TYPE_CHECKING:
    from fake_session import Setting
    from programs import Programs, Subject

_FAKED = tuple(f"tensorrt_{name}" for name in ("build", "engine", "cache", "feeds", "link", "session"))


@pytest.fixture(scope="session")
def engine_files(programs: Programs, shipped: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from programs import MAX_SEQ_LEN

    directory = tmp_path_factory.mktemp("engine")
    programs.engines(shipped, Mapping(), ExportOptions("float16", max_seq_len=MAX_SEQ_LEN), directory)
    (directory / "rank0.plan").write_text(str(directory / "rank0.onnx"))
    return directory


@pytest.fixture
def setting(engine_files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    from fake_gpu import FakeDriver, FakeEngine, fake_tensorrt
    from fake_session import Setting

    driver, engines = FakeDriver(), list[FakeEngine]()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, engines))
    monkeypatch.setattr(device, "driver", lambda: driver)
    for name in _FAKED:
        monkeypatch.delitem(sys.modules, f"moecompiler.backends.{name}", raising=False)
    setting = Setting(driver, engines, engine_files)
    yield setting
    for session in setting.sessions:  # while there is a GPU
        session.close()
    for name in _FAKED:
        sys.modules.pop(f"moecompiler.backends.{name}", None)
