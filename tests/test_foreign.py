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


def test_modules_are_read_from_the_names_of_the_tracing_exporter(tmp_path: Path) -> None:
    traced = model()
    del traced.graph.node[0].metadata_props[:]
    traced.graph.node[0].name = "/model/layers.0/self_attn/q_proj/MatMul"
    path = tmp_path / "model.onnx"
    onnx.save(traced, path)
    names = [node.name for node in open_foreign(path)[0].model.graph.node]
    assert names == ["model.layers.0.self_attn.q_proj/MatMul_0", "/Add_1"]


@pytest.mark.parametrize("opset", [18, 19, 20])
@pytest.mark.parametrize("external", [False, True])
def test_older_opsets_are_converted(tmp_path: Path, opset: int, external: bool) -> None:
    older = model()
    older.opset_import[0].version = opset
    older.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], name="node_constant", value_float=1.0))
    path = tmp_path / "model.onnx"
    onnx.save(older, path, save_as_external_data=external, location="model.data", size_threshold=0)
    program, reader = open_foreign(path)
    assert program.model.opset_import[0].version == 21
    assert list(program.weights) == ["w"]
    np.testing.assert_array_equal(materialize(program.weights["w"], reader), WEIGHT)
    assert [each.name for each in program.model.graph.input] == ["x"]
    assert module_of(program.model.graph.node[1].name) == "model.layers.0.self_attn.q_proj"


def test_small_constants_outside_the_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    program, _ = open_foreign(path)
    bias = next(tensor for tensor in program.model.graph.initializer if tensor.name == "b")
    np.testing.assert_array_equal(numpy_helper.to_array(bias), np.ones(16, np.float32))


SIZES_COMPUTED = """
<ir_version: 10, opset_import: ["": 21]>
g (float[batch, sequence, 32] x) => (float[a, b, c, d] y) <int64 zero = {0}, int64 one = {1}, int64[1] axis = {0},
    int64[1] rest = {-1}, int64[1] size = {8}> {
    shape = Shape (x)
    b0 = Gather (shape, zero)
    s0 = Gather (shape, one)
    b1 = Unsqueeze (b0, axis)
    s1 = Unsqueeze (s0, axis)
    heads = Concat <axis = 0> (b1, s1, rest, size)
    split = Reshape (x, heads)
    y = Transpose <perm = [0, 2, 1, 3]> (split)
}
"""


def test_shapes_that_the_graph_computes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(SIZES_COMPUTED), path)
    program, _ = open_foreign(path)
    split = next(value for value in program.model.graph.value_info if value.name == "split")
    dims = [dim.dim_param or dim.dim_value for dim in split.type.tensor_type.shape.dim]
    assert dims == ["batch", "sequence", 4, 8]


def test_a_graph_with_ops_that_nobody_knows_keeps_the_shapes_it_has(tmp_path: Path) -> None:
    strange = model()
    strange.opset_import.append(helper.make_opsetid("elsewhere", 1))
    strange.graph.node.append(helper.make_node("Strange", ["y"], ["z"], domain="elsewhere"))
    strange.graph.node.append(helper.make_node("Neg", ["z"], ["unseen"]))
    path = tmp_path / "model.onnx"
    onnx.save(strange, path)
    program, _ = open_foreign(path)
    shapes = {value.name: len(value.type.tensor_type.shape.dim) for value in program.model.graph.value_info}
    assert shapes["h"] == 2
    assert not list(Path().glob("sym_shape_infer*"))


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


BRANCHES = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 16] x, bool c) => (float[n, 16] y)
{
    h = MatMul (x, shared)
    k = If (c) <
        then_branch = then () => (float[n, 16] t) { t = MatMul (h, outer) },
        else_branch = other () => (float[n, 16] e) <float[1, 1] inner = {2}> { e = Mul (h, inner) }
    >
    y = Add (k, h)
}"""


@pytest.mark.parametrize("external", [False, True])
def test_graphs_within_a_graph(tmp_path: Path, external: bool) -> None:
    """What they read is held in the file: it may be written anywhere."""
    branching = onnx.parser.parse_model(BRANCHES)
    for name in ("shared", "outer"):
        branching.graph.initializer.append(numpy_helper.from_array(np.eye(16, dtype=np.float32) * 3, name))
    path = tmp_path / "model.onnx"
    onnx.save(branching, path, save_as_external_data=external, location="model.data", size_threshold=0)
    program, _ = open_foreign(path)
    assert list(program.weights) == ["shared"]
    held = {tensor.name: tensor for tensor in program.model.graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(held["outer"]), np.eye(16) * 3)
    (choice,) = (node for node in program.model.graph.node if node.op_type == "If")
    assert all(t.data_location != t.EXTERNAL for branch in choice.attribute for t in branch.g.initializer)


def test_more_than_a_file_can_hold_is_refused(tmp_path: Path) -> None:
    """Weights of types that no recipe knows would all have to be held in the graph."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT8, dims=[1 << 16, 1 << 15])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.data")
    large = model()
    large.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(large.SerializeToString())
    with (tmp_path / "model.data").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UserError, match="holds 2147483648 bytes of int8 beside its floating-point weights"):
        open_foreign(tmp_path / "model.onnx")
