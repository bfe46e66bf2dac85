"""Quantized ops before TensorRT's parser: without a plugin their bodies, codes constant; with one, codes that may be bound."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping

import onnx
import pytest
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import Prepared, prepare
from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.quantization.recipe import default_recipe
from moecompiler.quantization.schemes import int4

CODES = [
    f"model.layers.0.mlp.experts.{weight}_proj.{part}" for weight in ("gate_up", "down") for part in ("codes", "scales")
]


class Library:
    """Plugins for some ops, in name only."""

    def __init__(self, *ops: str):
        self.ops = ops

    def refusal(self, node: onnx.NodeProto, dims: tuple[tuple[int, ...], ...], dtype: str, sm: int) -> str | None:
        return None if node.op_type in self.ops else "there is no plugin for it"

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {}


@pytest.fixture
def prepared(shipped: Subject, programs: Programs) -> Callable[..., Prepared]:
    config = dataclasses.replace(shipped.config, num_hidden_layers=1)
    exported = programs.exported(config, GRID["one-rank"], 0, ExportOptions("float16", max_seq_len=MAX_SEQ_LEN))
    program, _ = run_passes(named_pipelines(default_recipe(int4(64)))["plugins"], exported)
    limits = EngineLimits(4, MAX_SEQ_LEN - 1, MAX_SEQ_LEN, config.vocab_size)

    def prepared(plugins: str, *ops: str) -> Prepared:
        settings = BuildSettings(limits, parse_plugins(plugins), "external")
        return prepare(program, settings, "float16", 90, Library(*ops))  # type: ignore[arg-type]

    return prepared


def test_without_a_plugin(prepared: Callable[..., Prepared]) -> None:
    result = prepared("auto", "Attention")
    ops = Counter(node.op_type for node in result.program.model.graph.node)
    assert (ops["DequantizeLinear"], ops["AttentionPlugin"]) == (4, 1)
    assert result.bound == {}
    assert "MoEInt4 runs as its plain operators: there is no plugin for it" in result.notes
    assert (
        "--moe_weights external: quantized experts are baked into the engine, for they are read by no plugin"
        in result.notes
    )
    with pytest.raises(UserError, match=r"\(MoEInt4\) cannot be a plugin: there is no plugin for it"):
        prepared("moe=on", "Attention")
    with pytest.raises(UserError, match=r"\(LinearInt4\) cannot be a plugin"):
        prepared("linear=on", "MoEInt4")


def test_with_a_plugin(prepared: Callable[..., Prepared]) -> None:
    result = prepared("auto", "MoEInt4")
    (node,) = (node for node in result.program.model.graph.node if node.op_type == "MoEInt4Plugin")
    assert list(node.input[2:6]) == CODES
    assert set(result.bound) == set(CODES)
    assert {value.name for value in result.program.model.graph.input} >= set(CODES)
    assert not any("baked" in note for note in result.notes)
