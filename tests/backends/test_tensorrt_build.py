"""What is asked of TensorRT's builder, and what becomes of its complaints; on a fake of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import FakeDriver, fake_tensorrt

from moecompiler.errors import UserError

NODES = ["model.layers.1.mlp/MoE_7", "model.layers.0.mlp/MatMul_3"]
SHAPES = {"x": ((1, 1), (2, 4), (2, 8))}


class Cache:
    def __init__(self, entries: bytes):
        self.entries = entries

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.entries += other.entries
        return True

    def serialize(self) -> bytes:
        return self.entries + b"new"


class FakeBuilder:
    """Builds what ``parses`` and ``builds`` allow, and notes what it was asked."""

    def __init__(self, tensorrt: Any):
        self.tensorrt, self.parses, self.builds = tensorrt, True, True
        self.asked: dict[str, Any] = {"profiles": [], "previews": []}
        tensorrt.Builder = self._make
        tensorrt.OnnxParser = lambda network, log: self
        tensorrt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        tensorrt.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        tensorrt.PreviewFeature = SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliases")
        tensorrt.LayerInformationFormat = SimpleNamespace(JSON="json")
        tensorrt.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: self)
        self.num_errors = 1

    def _make(self, log: Any) -> FakeBuilder:
        self.log = log
        return self

    def create_network(self, flags: int) -> str:
        self.asked["flags"] = flags
        return "network"

    def parse_from_file(self, path: str) -> bool:
        self.asked["path"] = path
        return self.parses

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(
            node_name=lambda: NODES[1],
            node_operator=lambda: "MatMul",
            desc=lambda: "Invalid Node",
            local_function_stack=lambda: ["MoEBody"],
        )

    def create_builder_config(self) -> Any:
        return SimpleNamespace(
            set_preview_feature=lambda name, on: self.asked["previews"].append((name, on)),
            add_optimization_profile=self.asked["profiles"].append,
            create_timing_cache=lambda entries: None if entries == b"damaged" else Cache(entries),
            set_timing_cache=lambda cache, ignore_mismatch: self.asked.update(cache=cache.entries),
        )

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, Any] = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *bounds: shapes.update({name: bounds}))

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("building", None, 2)
        monitor.phase_start("timing", "building", 4)
        for step in range(4):
            assert monitor.step_complete("timing", step)
        monitor.phase_finish("timing")
        monitor.step_complete("building", 0)
        monitor.phase_start("serializing", "building", 1)
        monitor.step_complete("serializing", 0)
        self.log.log(self.tensorrt.ILogger.WARNING, "a remark")
        if not self.builds:
            self.log.log(
                self.tensorrt.ILogger.ERROR, f"[x.cpp::f::1] Could not find any implementation for node {NODES[0]}."
            )
            return None
        return b"plan"

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: '{"Layers": []}')


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBuilder]:
    module = fake_tensorrt(FakeDriver(), [])
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.delitem(sys.modules, "moecompiler.backends.tensorrt_build", raising=False)
    yield FakeBuilder(module)
    sys.modules.pop("moecompiler.backends.tensorrt_build", None)


def build(told: list[float] | None = None, in_place: bool = False, timings: tuple[bytes, ...] = ()) -> Any:
    module = importlib.import_module("moecompiler.backends.tensorrt_build")
    progress = [] if told is None else told
    return module.build_plan(Path("rank0.onnx"), [SHAPES, SHAPES], NODES, timings, in_place, progress.append)


def test_what_is_asked(fake: FakeBuilder) -> None:
    """Strong types, both profiles, caches of earlier builds that fit, in-place outputs only where there are some."""
    told: list[float] = []
    plan = build(told, in_place=True, timings=(b"one ", b"damaged", b"two "))
    assert (plan.data, plan.layers, plan.warnings) == (b"plan", '{"Layers": []}', ("a remark",))
    assert fake.asked["flags"] == 1 << 1
    assert [profile.shapes for profile in fake.asked["profiles"]] == [SHAPES, SHAPES]
    assert fake.asked["previews"] == [("aliases", True)]
    assert (fake.asked["cache"], plan.timing) == (b"one two ", b"one two new")
    assert told == [0.125, 0.25, 0.375, 0.5, 1.0]  # only ever forwards
    build()
    assert fake.asked["previews"] == [("aliases", True)]


def test_parse_errors_name_the_module(fake: FakeBuilder) -> None:
    fake.parses = False
    with pytest.raises(
        UserError, match=r"^TensorRT cannot read the graph at model.layers.0.mlp/MatMul_3 \(module model"
    ) as raised:
        build()
    assert "MatMul_3 in MoEBody (MatMul): Invalid Node" in str(raised.value)


def test_build_errors_name_the_module(fake: FakeBuilder) -> None:
    fake.builds = False
    with pytest.raises(
        UserError, match=r"^TensorRT cannot build the engine at model.layers.1.mlp/MoE_7 \(module model.layers.1.mlp\)"
    ):
        build()
