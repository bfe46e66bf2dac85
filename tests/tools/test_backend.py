"""Backends as the command line opens them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from programs import MAX_SEQ_LEN, Passage, Programs, Subject, build_and_load, largest_error, run_ranks

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import Prepared, prepare
from moecompiler.export import ExportOptions
from moecompiler.graph import Program
from moecompiler.mapping import Mapping as RankMapping
from moecompiler.passes.common_subexpressions import CommonSubexpressions
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import apply, run_passes
from moecompiler.plugin_switches import parse_plugins
from moecompiler.tools.backend import tidy


class Library:
    """Has plugins for norms, in name only."""

    def refusal(self, node: onnx.NodeProto, dims: object, dtype: str, sm: int) -> str | None:
        return None if node.op_type in ("RMSNorm", "AddRMSNorm") else "no kernels"

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {}


def prepared(program: Program, plugins: str) -> Prepared:
    settings = BuildSettings(EngineLimits(3, MAX_SEQ_LEN, MAX_SEQ_LEN, 8), parse_plugins(plugins), "engine")
    return prepare(program, settings, "float32", 90, Library(), tidy)  # type: ignore[arg-type]


def test_bodies_that_are_inlined_are_tidied(
    programs: Programs, shipped: Subject, passage: Passage, tmp_path: Path
) -> None:
    """Nothing stands twice in what TensorRT's parser is given, and it says what the graph said."""
    options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    exported = programs.exported(shipped.config, RankMapping(), 0, options)
    fused, _ = run_passes(named_pipelines()["plugins"], exported)
    program = prepared(fused, "off").program
    assert not any(node.domain for node in program.model.graph.node)
    assert not apply(CommonSubexpressions(), program)[1].changes
    (session,) = build_and_load([program], shipped, tmp_path)
    (plain,) = programs.engines(shipped, RankMapping(), options, tmp_path)
    got, wanted = (run_ranks([each], RankMapping(), passage) for each in (session, plain))
    assert largest_error(got, wanted) < 1e-4


def test_plugins_are_left_as_they_are(programs: Programs, shipped: Subject) -> None:
    """Also where bodies beside them are inlined."""
    options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    exported = programs.exported(shipped.config, RankMapping(), 0, options)
    fused, _ = run_passes(named_pipelines()["plugins"], exported)
    result = prepared(fused, "auto")
    ours = [node for node in result.program.model.graph.node if node.domain]
    barriers = {node.name for node in ours if node.op_type == "BarrierPlugin"}
    assert {node.name for node in ours} == set(result.plugins) | barriers
    assert len(barriers) == shipped.config.num_hidden_layers  # sums over experts are kept apart
    assert {node.op_type for node in ours if node.name not in barriers} == {"RMSNormPlugin", "AddRMSNormPlugin"}
    names = [value.name for value in (*result.program.model.graph.input, *result.program.model.graph.output)]
    assert names == [value.name for value in (*fused.model.graph.input, *fused.model.graph.output)]
