"""Ranks of one graph share a plan where every weight is bound when the engine runs; on fakes of TensorRT and the GPU."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_session import LIMITS, Setting
from programs import MAX_SEQ_LEN, Programs, Subject
from safetensors.numpy import load_file

from moecompiler.backends.base import Backend, BuildSettings
from moecompiler.backends.choose import find_backend
from moecompiler.backends.tensorrt import TensorRTBackend
from moecompiler.backends.tensorrt_record import Made, Record
from moecompiler.config import ExportOptions
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.materializing import Materializer
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.runtime import device

MADE = Made("10.6.0", 90, "NVIDIA H200", "13.0")
OPTIONS = ExportOptions("float16", max_seq_len=MAX_SEQ_LEN)
EP2 = RankMapping.create(2, 1, 1, 2)
ALL = BuildSettings(LIMITS, parse_plugins("auto"), "all")


class Library:
    """Every op is a plugin; there are no kernels."""

    def refusal(self, node: Any, dims: Any, dtype: str, sm: int) -> None:
        return None

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {}

    def register(self) -> None:
        pass

    def compile_sampling(self, vocab: int, dtype: str, sm: int) -> bytes:
        return b"sampling"

    def compile_collectives(self, dtype: str, sm: int) -> bytes:
        return b"collectives"


@pytest.fixture
def tensorrt(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> TensorRTBackend:
    """Its plan is what the parser reads."""
    build = importlib.import_module("moecompiler.backends.tensorrt_build")
    monkeypatch.setattr(build, "build_plan", lambda path, *_: build.Plan(path.read_bytes(), b"", "{}"))
    info = device.DeviceInfo(MADE.gpu, MADE.sm, MADE.driver, 1 << 30)
    monkeypatch.setattr(device, "Device", lambda ordinal=0: SimpleNamespace(info=lambda: info))
    return TensorRTBackend(Library())  # type: ignore[arg-type]


def test_ranks_of_a_stage_share(
    tensorrt: TensorRTBackend, programs: Programs, shipped: Subject, tmp_path: Path
) -> None:
    """Experts and rows of the vocabulary that are a rank's are data, and come with its weights."""
    exported = [programs.exported(shipped.config.with_layers(1), EP2, rank, OPTIONS) for rank in range(2)]
    of_ranks = [run_passes(named_pipelines()["plugins"], each)[0] for each in exported]
    first, second = (tensorrt.shared_graph(each, ALL) for each in of_ranks)
    assert first == second
    assert first is not None
    for settings in (replace(ALL, moe_weights="external"), replace(ALL, moe_weights="engine")):
        assert tensorrt.shared_graph(of_ranks[0], settings) is None

    shared = tensorrt.build_shared(of_ranks[1], "plan-x", tmp_path, ALL, lambda fraction: None)
    assert not any("safetensors" in name for name in shared)
    for rank in (0, 1):
        staged = tensorrt.build(
            of_ranks[rank], shipped.reader, f"rank{rank}", tmp_path, ALL, lambda fraction: None, "plan-x"
        )
        assert not shared.keys() & staged.keys()
        for name, path in staged.items():
            os.replace(path, tmp_path / name)
        record = Record.load(tmp_path / f"rank{rank}.engine.json")
        assert record.shared == "plan-x"
        assert set(record.bound) == set(of_ranks[rank].weights)
        tensors = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, recipe in of_ranks[rank].weights.items():
            np.testing.assert_array_equal(tensors[name], Materializer(shipped.reader).tensor(recipe))
    assert (tmp_path / "rank0.onnx").read_bytes() == (tmp_path / "rank1.onnx").read_bytes()
    held = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert [each["model.embed_tokens.first_row"].item() for each in held] == [0, 768]
    assert [each["model.layers.0.mlp.experts.expert_ids"][0] for each in held] == [0, 4]


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_who_shares(backend: str, programs: Programs, shipped: Subject) -> None:
    made: Backend = find_backend(backend)
    config = shipped.config.with_layers(1)
    of_ranks = [programs.optimized(config, EP2, rank, OPTIONS) for rank in range(2)]
    graphs = {made.shared_graph(each, ALL) for each in of_ranks}
    assert (None in graphs) == (backend == "onnxruntime")
    assert len(graphs) == 1


def test_a_shared_plan_is_loaded(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rank's record, which names it."""
    for name in ("rank0.onnx", "rank0.safetensors"):
        shutil.copy(setting.directory / name, tmp_path / name)
    (tmp_path / "plan-x.plan").write_text(str(tmp_path / "rank0.onnx"))
    record = Record(MADE, 2, (), {}, {}, "plan-x")
    (tmp_path / "rank0.engine.json").write_text(json.dumps(record.to_json()))
    info = device.DeviceInfo(MADE.gpu, MADE.sm, MADE.driver, 1 << 30)
    monkeypatch.setattr(device, "Device", lambda ordinal=0: SimpleNamespace(info=lambda: info))
    session = TensorRTBackend(Library()).load(tmp_path, "rank0", LIMITS, 1)  # type: ignore[arg-type]
    setting.sessions.add(session)
    assert session.vocab_size == LIMITS.vocab_size
