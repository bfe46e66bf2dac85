"""Engines for RTX cards, built where there is none: what builds, what is refused, and how a complaint reads."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import find_backend
from moecompiler.backends.tensorrt_profiles import profiles
from moecompiler.backends.tensorrt_rtx_build import build_plan
from moecompiler.backends.tensorrt_rtx_program import lower
from moecompiler.config import PRESETS, ExportOptions
from moecompiler.errors import UserError
from moecompiler.export import export_rank
from moecompiler.graph import Program, point_weights_at
from moecompiler.mapping import Mapping
from moecompiler.packing import tensors_of
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.standard_ops import StandardOps
from moecompiler.pipeline import Pass, run_passes
from moecompiler.plugin_switches import merge_legacy
from moecompiler.safetensors_writing import write
from moecompiler.weights import Shape, materialize

pytestmark = pytest.mark.xdist_group("tensorrt-rtx")
LIMITS = EngineLimits(4, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, 1536)
SETTINGS = BuildSettings(LIMITS)


def passes(pipeline: str) -> tuple[Pass, ...]:
    return (*named_pipelines()["plugins"], StandardOps()) if pipeline == "standard" else named_pipelines()[pipeline]


def build(
    program: Program, reader: Any, directory: Path, settings: BuildSettings = SETTINGS
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files, and what is noted of the engine."""
    steps: list[float] = []
    files = find_backend("tensorrt-rtx").build(program, reader, "rank0", directory, settings, steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 1.0
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in files.values())
    return files, json.loads(files["rank0.engine.json"].read_text())


@pytest.mark.parametrize(
    ("mapping", "dtype", "pipeline"),
    [
        ("one-rank", "float16", "ootb"),
        ("one-rank", "bfloat16", "standard"),
        ("ep2-pp2", "float16", "standard"),
        ("ep2-pp2", "bfloat16", "plugins"),
    ],
)
def test_the_shipped_model_builds(
    shipped: Subject, programs: Programs, tmp_path: Path, mapping: str, dtype: str, pipeline: str
) -> None:
    """One rank of each stage: the ranks of a stage share its graph."""
    split = GRID[mapping]
    for rank in range(0, split.world_size, split.tp_size):
        exported = programs.exported(shipped.config, split, rank, ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN))
        program, _ = run_passes(passes(pipeline), exported)
        (tmp_path / str(rank)).mkdir()
        files, record = build(program, shipped.reader, tmp_path / str(rank))
        weights = sum(recipe.nbytes for recipe in program.weights.values())
        assert files["rank0.plan"].stat().st_size > 0.9 * weights
        assert record["compute_capabilities"] == ["8.9", "12.0"]
        assert record["communicator"] == (list(split.tp_group(rank)) if split.tp_size > 1 else [])
        layers = len(split.layers(rank, 4))
        assert len(record["aliases"]) == (2 * layers if pipeline == "standard" else 0)
        first = split.layers(rank, 4)[0]
        if pipeline == "standard":
            assert record["aliases"][f"present.{first}.value"] == f"past_key_values.{first}.value"


@pytest.mark.slow
def test_every_mapping_builds(shipped: Subject, programs: Programs, tmp_path: Path) -> None:
    """In float32, which builds for the newest cards as it does for all from 8.0 on."""
    settings = dataclasses.replace(SETTINGS, compute_capabilities=("12.0",))
    for name, split in GRID.items():
        for rank in range(0, split.world_size, split.tp_size):
            options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
            program, _ = run_passes(
                (*passes("plugins"), StandardOps()), programs.exported(shipped.config, split, rank, options)
            )
            directory = tmp_path / f"{name}-{rank}"
            directory.mkdir()
            build(program, shipped.reader, directory, settings)


class _Zeros:
    """Weights of any size, without a file."""

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        return np.zeros(shape, np.float16)


@pytest.mark.slow
def test_a_full_size_layer_builds(tmp_path: Path) -> None:
    """A layer of Mixtral 8x7B, with and without standard ops. Its experts, 2.8 GB, are inputs, as by default, and not written."""
    config = dataclasses.replace(PRESETS["8x7b"], num_hidden_layers=1, vocab_size=256)
    exported = export_rank(config, Mapping(), 0, ExportOptions("float16", max_seq_len=2048))
    settings = BuildSettings(EngineLimits(8, 1024, 2048, 256))
    for pipeline in ("standard", "ootb"):
        lowered = lower(run_passes(passes(pipeline), exported)[0], settings, "float16")
        assert sum(recipe.nbytes for recipe in lowered.bound.values()) == 8 * 3 * 4096 * 14336 * 2
        weights = lowered.program.weights
        write(
            tmp_path / "w",
            tensors_of(lowered.program.weights),
            lambda name, held=weights: materialize(held[name], _Zeros()),
        )
        model = point_weights_at(lowered.program, "w").model
        (tmp_path / "graph").write_bytes(model.SerializeToString())
        shapes, names = profiles(model.graph.input, settings.limits), [node.name for node in model.graph.node]
        plan = build_plan(tmp_path / "graph", shapes, names, ("8.9", "12.0"), lambda fraction: None)
        assert plan.data.nbytes < 200e6


@pytest.fixture(scope="module")
def standard(shipped: Subject, programs: Programs) -> Program:
    options = ExportOptions("float16", max_seq_len=MAX_SEQ_LEN)
    return run_passes(passes("standard"), programs.exported(shipped.config, GRID["one-rank"], 0, options))[0]


def test_experts_can_be_bound_when_the_engine_runs(standard: Program, shipped: Subject, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, moe_weights="external", compute_capabilities=("7.5",))
    files, record = build(standard, shipped.reader, tmp_path, settings)
    assert record["bound"] == [f"model.layers.{i}.mlp.experts.{w}_proj" for i in range(4) for w in ("gate_up", "down")]
    assert record["compute_capabilities"] == ["7.5"]
    inputs = {value.name for value in onnx.load(files["rank0.onnx"], load_external_data=False).graph.input}
    assert inputs >= set(record["bound"])


def _unknown_node(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.name.startswith("model.layers.1.self_attn")).op_type = "NoSuch"


def _unknown_in_a_body(model: onnx.ModelProto) -> None:
    (function,) = model.functions
    next(node for node in function.node if node.op_type == "Sigmoid").op_type = "NoSuch"


def _cache_that_is_no_input(model: onnx.ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "TensorScatter"][3]
    at = [each.name for each in model.graph.node].index(node.name)
    model.graph.node.insert(at, onnx.helper.make_node("Identity", [node.input[0]], ["copy"], "copy"))
    next(each for each in model.graph.node if each.name == node.name).input[0] = "copy"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (
            _unknown_node,
            r"cannot read the graph at model\.layers\.1\.self_attn/QKV_\d+ \(module model\.layers\.1\.self_attn\): .*",
        ),
        (
            _unknown_in_a_body,
            r"cannot read the graph at model\.layers\.0\.mlp/MoE_\d+\.NoSuch_\d+ \(module model\.layers\.0\.mlp\): .*",
        ),
        (
            _cache_that_is_no_input,
            r"cannot build the engine at model\.layers\.1\.self_attn/Attention_\S+ \(module \S+\): .*network input.*",
        ),
    ],
)
def test_complaints_name_the_module(
    standard: Program, shipped: Subject, tmp_path: Path, change: Callable[[onnx.ModelProto], None], where: str
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(standard.model)
    change(model)
    with pytest.raises(UserError, match=rf"^TensorRT-RTX {where}$"):
        find_backend("tensorrt-rtx").build(
            Program(model, standard.weights), shipped.reader, "rank0", tmp_path, SETTINGS, lambda fraction: None
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [
        ("float16", {"compute_capabilities": ("9.0",)}, r"9\.0: .* builds for 7\.5, 8\.0, .*12\.1, not 9\.0"),
        (
            "bfloat16",
            {"compute_capabilities": ("7.5", "8.9")},
            r"7\.5,8\.9: cards of 7\.5 .* float16 alone, not bfloat16",
        ),
        ("float16", {"plugins": merge_legacy("moe=on", "float16", "auto", "auto")}, "has no plugins and inlines"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_built(dtype: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_backend("tensorrt-rtx").notes(dtype, dataclasses.replace(SETTINGS, **changes))


def test_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    backend = find_backend("tensorrt-rtx")
    for ask in (backend.version, partial(backend.notes, "float16", SETTINGS)):
        with pytest.raises(
            UserError, match=r"^TensorRT-RTX is not installed: pip install 'moecompiler\[tensorrt-rtx\]'$"
        ):
            ask()


def test_engines_are_not_run_here(tmp_path: Path) -> None:
    backend = find_backend("tensorrt-rtx")
    assert backend.notes("float16", SETTINGS)[0].startswith(
        "engines run on RTX cards of compute capability 8.9 and 12.0"
    )
    with pytest.raises(
        UserError, match="holds engines for RTX cards, which run in NVIDIA's TensorRT-RTX runtime and not here"
    ):
        backend.load(tmp_path, "rank0", LIMITS, 1)


def test_other_settings_make_other_engines() -> None:
    identity = find_backend("tensorrt-rtx").identity
    assert identity(SETTINGS) == identity(dataclasses.replace(SETTINGS, compute_capabilities=("8.9", "12.0")))
    others = (
        {"compute_capabilities": ("8.6",)},
        {"moe_weights": "engine"},
        {"limits": dataclasses.replace(LIMITS, max_batch_size=1)},
    )
    for changes in others:
        assert identity(dataclasses.replace(SETTINGS, **changes)) != identity(SETTINGS)
