"""An engine's kernels of sampling: compiled where it is built, loaded where it runs, on fakes of TensorRT and the GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_session import LIMITS, FakeSampling, Setting
from programs import MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings
from moecompiler.backends.tensorrt import TensorRTBackend
from moecompiler.backends.tensorrt_record import Made
from moecompiler.config import ExportOptions
from moecompiler.graph import COLLECTIVES, Program
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.plugin_switches import parse_plugins
from moecompiler.runtime import device

MADE = Made("10.6.0", 90, "NVIDIA H200", "13.0")


class Library:
    """No plugins, and kernels of sampling unless ``without``."""

    def __init__(self, setting: Setting, without: bool = False):
        self.setting, self.without = setting, without

    def refusal(self, node: Any, dims: Any, dtype: str, sm: int) -> str:
        return "there is none"

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {}

    def register(self) -> None:
        raise AssertionError("there is no plugin")

    def compile_collectives(self, dtype: str, sm: int) -> bytes:
        return f"{dtype} {sm}".encode()

    def load_collectives(self, data: bytes) -> str:
        return data.decode()

    def compile_sampling(self, vocab: int, dtype: str, sm: int) -> bytes | None:
        return None if self.without else f"{vocab} {dtype} {sm}".encode()

    def load_sampling(self, data: bytes) -> FakeSampling:
        assert data == b"1536 float16 90"
        return FakeSampling(self.setting.driver, 1536, np.float16)


@pytest.fixture
def program(programs: Programs, shipped: Subject) -> Program:
    return programs.optimized(shipped.config, RankMapping(), 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN))


@pytest.mark.parametrize("without", [False, True])
def test_built_and_loaded(
    without: bool,
    setting: Setting,
    program: Program,
    shipped: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = importlib.import_module("moecompiler.backends.tensorrt_build")
    plan = str(setting.directory / "rank0.onnx").encode()
    monkeypatch.setattr(build, "build_plan", lambda *args: build.Plan(plan, b"", "{}"))
    info = device.DeviceInfo(MADE.gpu, MADE.sm, MADE.driver, 1 << 30)
    monkeypatch.setattr(device, "Device", lambda ordinal=0: SimpleNamespace(info=lambda: info))
    backend, settings = TensorRTBackend(Library(setting, without)), BuildSettings(LIMITS, parse_plugins("off"))
    staged = backend.build(program, shipped.reader, "rank0", tmp_path, settings, lambda fraction: None)
    for name, temporary in staged.items():
        os.replace(temporary, tmp_path / name)
    assert (tmp_path / "rank0.sampling").is_file() is not without
    session = backend.load(tmp_path, "rank0", LIMITS, 1)
    setting.sessions.add(session)
    assert session.can_sample is not without
    assert session.collective_kernels is None


def test_kernels_of_collectives(
    setting: Setting, programs: Programs, shipped: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Are there where ranks exchange something, for the graph's type."""
    build = importlib.import_module("moecompiler.backends.tensorrt_build")
    plan = str(setting.directory / "rank0.onnx").encode()
    monkeypatch.setattr(build, "build_plan", lambda *args: build.Plan(plan, b"", "{}"))
    info = device.DeviceInfo(MADE.gpu, MADE.sm, MADE.driver, 1 << 30)
    monkeypatch.setattr(device, "Device", lambda ordinal=0: SimpleNamespace(info=lambda: info))
    monkeypatch.setattr(Library, "refusal", lambda self, node, *_: None if node.op_type in COLLECTIVES else "none")
    monkeypatch.setattr(Library, "register", lambda self: None)
    program = programs.optimized(
        shipped.config, RankMapping.create(2), 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN)
    )
    backend, settings = TensorRTBackend(Library(setting)), BuildSettings(LIMITS, parse_plugins("off"))
    staged = backend.build(program, shipped.reader, "rank0", tmp_path, settings, lambda fraction: None)
    for name, temporary in staged.items():
        os.replace(temporary, tmp_path / name)
    session = backend.load(tmp_path, "rank0", LIMITS, 1)
    setting.sessions.add(session)
    assert session.collective_kernels == "float16 90"


@pytest.mark.parametrize(
    ("name", "dims"), [("hidden_states", ["batch", 1536]), ("logits", ["batch", "sequence", 1536])]
)
def test_other_outputs_have_none(name: str, dims: list[Any], setting: Setting) -> None:
    """Of a stage that is not the last, and where there are logits of every token."""
    output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, dims)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [output]))
    backend = TensorRTBackend(Library(setting))
    assert backend._compile_sampling(Program(model)) is None
