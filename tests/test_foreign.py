"""ONNX files of others: taken by reference, and refused in one line where they are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from moecompiler.errors import UserError
from moecompiler.foreign import open_foreign
from moecompiler.graph import module_of
from moecompiler.weights import materialize

WEIGHT = np.arange(32 * 16, dtype=np.float32).reshape(32, 16)


def model() -> onnx.ModelProto:
    product = helper.make_node("MatMul", ["x", "w"], ["h"], name="node_linear")
    scopes = product.metadata_props.add()
    scopes.key, scopes.value = (
        "pkg.torch.onnx.name_scopes",
        "['', 'model', 'model.layers.0.self_attn.q_proj', 'linear']",
    )
    graph = helper.make_graph(
        [product, helper.make_node("Add", ["h", "b"], ["y"], name="node_add")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.ones(16, np.float32), "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("external", [False, True])
def test_weights_are_taken_by_reference(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(), path, save_as_external_data=external, location="model.data", size_threshold=100)
    program, reader = open_foreign(path)
    assert list(program.weights) == ["w"]  # the bias is small enough to be read
    np.testing.assert_array_equal(materialize(program.weights["w"].transposed((1, 0)), reader), WEIGHT.T)
    assert [module_of(node.name) for node in program.model.graph.node] == ["model.layers.0.self_attn.q_proj", ""]
    assert not any(node.metadata_props for node in program.model.graph.node)


def _opset_17(broken: onnx.ModelProto) -> None:
    broken.opset_import[0].version = 17


def _cycle(broken: onnx.ModelProto) -> None:
    broken.graph.node[0].input[0] = "y"


def _nothing_writes(broken: onnx.ModelProto) -> None:
    broken.graph.node[1].input[1] = "bias"


def _empty(broken: onnx.ModelProto) -> None:
    broken.graph.ClearField("node")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_opset_17, "is of opset 17; export it with opset_version=21"),
        (_cycle, "reads 'y' before it is written"),
        (_nothing_writes, "reads 'bias', which nothing writes"),
        (_empty, "holds no graph"),
    ],
)
def test_broken_graphs_are_refused(tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    broken = model()
    change(broken)
    path = tmp_path / "model.onnx"
    path.write_bytes(broken.SerializeToString())
    with pytest.raises(UserError, match=message) as caught:
        open_foreign(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not an ONNX file"):
        open_foreign(path)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../secret.data", "outside the file's own folder"),
        ("/etc/passwd", "outside the file's own folder"),
        ("link.data", "outside the file's own folder"),
        ("missing.data", "which is missing"),
        ("short.data", "which ends before it"),
    ],
)
def test_external_data_that_cannot_be_trusted_is_refused(tmp_path: Path, location: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.data").write_bytes(bytes(4096))
    (folder / "short.data").write_bytes(bytes(100))
    (folder / "link.data").symlink_to(tmp_path / "secret.data")
    onnx.save(model(), folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=100)
    broken = onnx.load(folder / "model.onnx", load_external_data=False)
    next(entry for entry in broken.graph.initializer[0].external_data if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(broken.SerializeToString())
    with pytest.raises(UserError, match=message):
        open_foreign(folder / "model.onnx")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        open_foreign(tmp_path / "nowhere.onnx")
