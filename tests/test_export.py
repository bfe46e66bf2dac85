"""Exported programs: their signature, their ops, where their nodes say they come from, and that they are always the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from programs import (
    GRID,
    MAX_SEQ_LEN,
    TINY_MIXTRAL,
    Passage,
    Programs,
    Subject,
    hf_logits,
    largest_error,
    run_ranks,
    torch_sessions,
)

from moecompiler.config import ExportOptions, ModelConfig, NormalizationMode
from moecompiler.graph import check, module_of, serialize
from moecompiler.mapping import Mapping

# the four kinds of stage: name → (mapping, rank)
STAGES = {
    "only": ("one-rank", 0),
    "first": ("ep2-pp2", 0),
    "middle": ("pp4", 1),
    "last": ("ep2-pp2", 2),
}
DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
EVERY = [pytest.param(dtype, stage, id=f"{dtype}-{stage}") for stage in STAGES for dtype in DTYPES]


def options(dtype: str = "float32", **others: Any) -> ExportOptions:
    return ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN, **others)


def signature(values: Any) -> list[tuple[str, int, list[int | str]]]:
    """Name, element type and dimensions of graph inputs or outputs."""
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    ]


def expected_signature(config: ModelConfig, mapping: Mapping, rank: int, dtype: str) -> tuple[Any, Any]:
    """The inputs and outputs that ``export_rank``'s docstring promises."""
    real, integer = DTYPES[dtype], TensorProto.INT64
    first, last = mapping.is_first_stage(rank), mapping.is_last_stage(rank)
    hidden = ["batch", "sequence", config.hidden_size]
    kv_heads = max(1, config.num_key_value_heads // mapping.tp_size)
    cache = ["batch", kv_heads, MAX_SEQ_LEN, config.head_dim]
    inputs = [
        ("input_ids", integer, ["batch", "sequence"]) if first else ("hidden_states", real, hidden),
        ("position_ids", integer, ["batch", "sequence"]),
    ]
    if last:
        inputs.append(("last_token_ids", integer, ["batch"]))
    outputs = [("logits", real, ["batch", config.vocab_size]) if last else ("next_hidden_states", real, hidden)]
    for layer in mapping.layers(rank, config.num_hidden_layers):
        for part in ("key", "value"):
            inputs.append((f"past_key_values.{layer}.{part}", real, cache))
            outputs.append((f"present.{layer}.{part}", real, cache))
    return inputs, outputs


@pytest.mark.parametrize(("dtype", "stage"), EVERY)
def test_program(dtype: str, stage: str, programs: Programs, shipped: Subject) -> None:
    """Every dtype and kind of stage passes the checker, has the promised signature, standard ops and HF's module paths."""
    mapping, rank = GRID[STAGES[stage][0]], STAGES[stage][1]
    program = programs.exported(shipped.config, mapping, rank, options(dtype))
    graph = program.model.graph
    check(program)
    assert (signature(graph.input), signature(graph.output)) == expected_signature(shipped.config, mapping, rank, dtype)
    assert {(o.domain, o.version) for o in program.model.opset_import} <= {("", 21), ("moecompiler", 1)}
    assert (program.model.ir_version, program.model.producer_name) == (10, "moecompiler")
    for node in graph.node:
        if node.domain == "moecompiler":
            assert node.op_type in ("AllReduce", "AllGather")
            assert mapping.tp_size > 1
        else:
            schema = onnx.defs.get_schema(node.op_type, 21, "")
            assert not schema.deprecated
    assert len({node.name for node in graph.node}) == len(graph.node)
    modules = {module_of(node.name) for node in graph.node}
    assert modules <= {name for name, _ in shipped.hf.named_modules()}
    for layer in mapping.layers(rank, shipped.config.num_hidden_layers):
        assert {f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp.gate", "mlp.experts")} <= modules


@pytest.mark.parametrize(("dtype", "stage"), EVERY)
def test_weights_are_references(dtype: str, stage: str, programs: Programs, shipped: Subject) -> None:
    """Whatever has a recipe has its shape and dtype and no data; of data there is next to nothing."""
    mapping, rank = GRID[STAGES[stage][0]], STAGES[stage][1]
    program = programs.exported(shipped.config, mapping, rank, options(dtype))
    held = 0
    for tensor in program.model.graph.initializer:
        recipe = program.weights.get(tensor.name)
        if recipe is None:
            held += tensor.ByteSize()
            continue
        assert tensor.data_location == TensorProto.EXTERNAL
        assert tensor.ByteSize() < 500
        assert tuple(tensor.dims) == recipe.shape
        assert tensor.data_type == (TensorProto.INT64 if recipe.values is not None else DTYPES[dtype])
    assert held < 1000
    assert set(program.weights) <= {tensor.name for tensor in program.model.graph.initializer}


@pytest.mark.parametrize(("dtype", "stage"), EVERY)
def test_nothing_of_the_machine_is_in_the_file(dtype: str, stage: str, programs: Programs, shipped: Subject) -> None:
    """No path, no stack trace, no notes of the exporter."""
    mapping, rank = GRID[STAGES[stage][0]], STAGES[stage][1]
    program = programs.exported(shipped.config, mapping, rank, options(dtype))
    data = b"".join(serialize(program, "rank0"))
    for text in (os.getcwd(), str(Path.home()), sys.prefix, str(Path(torch.__file__).parent), "Traceback", "pkg.torch"):
        assert text.encode() not in data
    assert not re.search(rb"\.py\b|/(home|usr|tmp|root|work|opt)/", data)
    graph = program.model.graph
    for item in (program.model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        assert not item.metadata_props
        assert not item.doc_string


@pytest.mark.parametrize("name", ["one-rank", "tp2", "tp2-ep2", "tp2-pp2"])
def test_collectives(name: str, programs: Programs, shipped: Subject) -> None:
    """One sum for the embedding, two a layer, one gather of the logits, each over the ranks of the stage; none alone."""
    mapping = GRID[name]
    for rank in range(0, mapping.world_size, mapping.tp_size):
        graph = programs.exported(shipped.config, mapping, rank, options()).model.graph
        found = [node for node in graph.node if node.domain == "moecompiler"]
        places = Counter((node.op_type, module_of(node.name)) for node in found)
        layers = mapping.layers(rank, shipped.config.num_hidden_layers)
        wanted = Counter(
            ("AllReduce", f"model.layers.{layer}.{part}") for layer in layers for part in ("self_attn", "mlp")
        )
        if mapping.is_first_stage(rank):
            wanted["AllReduce", "model.embed_tokens"] += 1
        if mapping.is_last_stage(rank):
            wanted["AllGather", "lm_head"] += 1
        assert places == (wanted if mapping.tp_size > 1 else Counter())
        for node in found:
            assert tuple(helper.get_node_attr_value(node, "group")) == mapping.tp_group(rank)
            assert {attribute.name for attribute in node.attribute} == {"group"}


FRESH = """
import sys
from pathlib import Path
from moecompiler.config import ExportOptions, load_config
from moecompiler.export import export_rank
from moecompiler.graph import serialize
from moecompiler.mapping import Mapping
options = ExportOptions("float32", max_seq_len=int(sys.argv[2]))
program = export_rank(load_config(sys.argv[1]), Mapping.create(4, 1, 2, 2), 3, options)
for part, path in zip(serialize(program, "rank"), sys.argv[3:], strict=True):
    Path(path).write_bytes(part)
"""


def test_always_the_same_bytes(programs: Programs, shipped: Subject, tmp_path: Path) -> None:
    """A fresh process with another hash seed writes the same bytes, and for another rank of the stage: only recipes differ."""
    files = [tmp_path / "rank.onnx", tmp_path / "rank.weights.json"]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run(
        [sys.executable, "-c", FRESH, TINY_MIXTRAL, str(MAX_SEQ_LEN), *files],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    here = [serialize(programs.exported(shipped.config, GRID["tp2-ep2"], rank, options()), "rank") for rank in range(4)]
    assert {model for model, _ in here} == {files[0].read_bytes()}
    assert here[3][1] == files[1].read_bytes()
    assert len({recipes for _, recipes in here}) == 4


@pytest.mark.parametrize("mode", [NormalizationMode.NONE, NormalizationMode.SPARSE_MIXER], ids=lambda mode: mode.name)
def test_normalization_modes(
    mode: NormalizationMode, programs: Programs, shipped: Subject, passage: Passage, tmp_path: Path
) -> None:
    """The other modes export and run (``RENORMALIZE`` is the grid's): as in torch, and not as in Mixtral."""
    mapping, chosen = GRID["one-rank"], options(normalization_mode=mode)
    program = programs.exported(shipped.config, mapping, 0, chosen)
    check(program)
    assert all(node.domain == "" for node in program.model.graph.node)
    logits = run_ranks(programs.engines(shipped, mapping, chosen, tmp_path), mapping, passage)
    assert largest_error(logits, run_ranks(torch_sessions(shipped, mapping, chosen), mapping, passage)) < 2e-4
    assert largest_error(logits, hf_logits(shipped.hf, passage)) > 1


def test_logits_of_all_tokens(programs: Programs, shipped: Subject, passage: Passage, tmp_path: Path) -> None:
    """With ``all_logits`` the graph asks for no last tokens and gives what HF gives for each; a step picks its own."""
    mapping, chosen = GRID["one-rank"], options(all_logits=True)
    program = programs.exported(shipped.config, mapping, 0, chosen)
    check(program)
    assert "last_token_ids" not in [value.name for value in program.model.graph.input]
    logits = next(value for value in signature(program.model.graph.output) if value[0] == "logits")
    assert logits[2] == ["batch", "sequence", shipped.config.vocab_size]
    (engine,) = programs.engines(shipped, mapping, chosen, tmp_path)
    assert largest_error(run_ranks([engine], mapping, passage), hf_logits(shipped.hf, passage)) < 2e-4

    tokens = passage.tokens[:2, :9]
    positions = np.tile(np.arange(9), (2, 1))
    caches = {v.name: np.zeros((2, *v.shape[1:]), np.float32) for v in engine.session.get_inputs()[2:]}
    feeds = {"input_ids": tokens, "position_ids": positions} | caches
    (everything,) = engine.session.run(["logits"], feeds)
    with torch.no_grad():
        wanted = shipped.hf(torch.from_numpy(tokens)).logits.numpy()
    assert largest_error(everything, wanted) < 2e-4
