"""Programs on disk: what is written is read again, points where the weights will be, and what is broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import facts, program, whole
from readers import ArrayReader

from moecompiler import safetensors_writing
from moecompiler.errors import UserError
from moecompiler.graph import (
    Program,
    check,
    load_program,
    module_of,
    node_name,
    output_of,
    point_weights_at,
    serialize,
)
from moecompiler.packing import tensors_of
from moecompiler.weights import Recipe, materialize

RECIPES = {
    "b": whole("b", 3, dtype="float16"),
    "ids": Recipe("int64", (2,), values=(5, 6)),
    "a": whole("a", 2, 3, dtype="float16").transposed((1, 0)),
}
TEXT = """g (float16[N, 3] x, int64[2] i) => (float16[N, 2] y, int64[2] j)
    { ["m/MatMul_0"] p = MatMul (x, a) ["m/Mul_1"] q = Mul (x, b) ["m/MatMul_2"] r = MatMul (q, a)
      ["m/Add_3"] y = Add (p, r) ["/Add_4"] j = Add (i, ids) }"""
READER = ArrayReader({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([7, 8, 9], np.float32)})


def save(it: Program, directory: Path, stem: str = "rank0") -> Path:
    model, recipes = serialize(it, stem)
    (directory / f"{stem}.onnx").write_bytes(model)
    (directory / f"{stem}.weights.json").write_bytes(recipes)
    return directory / f"{stem}.onnx"


@pytest.mark.parametrize(
    ("module", "name"), [("model.layers.3.self_attn.q_proj", "MatMul_7"), ("", "Add_1"), ("lm_head", "Gemm_0")]
)
def test_node_names_hold_modules(module: str, name: str) -> None:
    assert module_of(node_name(module, name)) == module
    assert module_of(output_of(module)) == module


def test_names_without_a_module() -> None:
    assert module_of("Add_1") == ""


def test_round_trip(tmp_path: Path) -> None:
    saved = program(TEXT, RECIPES)
    loaded = load_program(save(saved, tmp_path))
    assert facts(loaded) == facts(saved)
    assert loaded.weights == RECIPES
    assert serialize(loaded, "rank0") == serialize(saved, "rank0")


def test_bytes_do_not_depend_on_the_order_of_recipes() -> None:
    one = program(TEXT, RECIPES)
    other = Program(one.model, dict(reversed(RECIPES.items())))
    assert serialize(one, "rank0") == serialize(other, "rank0")


def test_a_program_without_recipes(tmp_path: Path) -> None:
    plain = program("g (float[2] x) => (float[2] y) { y = Neg (x) }")
    (tmp_path / "plain.onnx").write_bytes(plain.model.SerializeToString())
    assert load_program(tmp_path / "plain.onnx").weights == {}


def test_weights_are_where_the_graph_says(tmp_path: Path) -> None:
    """Written in the packed order, the weights are found by ONNX itself at the offsets of the serialized graph."""
    saved = program(TEXT, RECIPES)
    path = save(saved, tmp_path)
    safetensors_writing.write(
        tmp_path / "rank0.safetensors",
        tensors_of(saved.weights),
        lambda name: materialize(RECIPES[name], READER),
    )
    model = onnx.load(path)  # with external data
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [[0, 3], [1, 4], [2, 5]],
        "b": [7, 8, 9],
        "ids": [5, 6],
    }
    assert arrays["a"].dtype == np.float16


def test_pointing_changes_nothing_else() -> None:
    before = program(TEXT, RECIPES)
    original = before.model.SerializeToString(deterministic=True)
    pointed = point_weights_at(before, "elsewhere.safetensors")
    assert before.model.SerializeToString(deterministic=True) == original
    assert facts(pointed) == facts(before)
    for tensor in pointed.model.graph.initializer:
        assert {e.key: e.value for e in tensor.external_data}["location"] == "elsewhere.safetensors"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("rank0.onnx", None, r"rank0\.onnx: not found"),
        ("rank0.onnx", b"no protobuf", r"rank0\.onnx: is not an ONNX file: "),
        ("rank0.onnx", b"", r"rank0\.onnx: is not an ONNX file: it holds no graph"),
        ("rank0.weights.json", b"{", r"rank0\.weights\.json: is not a table of weight recipes"),
        ("rank0.weights.json", b"[]", r"rank0\.weights\.json: is not a table of weight recipes"),
        ("rank0.weights.json", b'{"a": 1}', r"rank0\.weights\.json: is not a table of weight recipes"),
        ("rank0.weights.json", b'{"a": {"dtype": "float16"}}', r"rank0\.weights\.json: is not a table of weight"),
        (
            "rank0.weights.json",
            json.dumps({"a": {"dtype": "float16", "shape": [2], "pieces": [["a", [0]]]}}).encode(),
            r"rank0\.weights\.json: is not a table of weight recipes",
        ),
    ],
)
def test_broken_files(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = save(program(TEXT, RECIPES), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_program(path)


def test_a_truncated_graph(tmp_path: Path) -> None:
    path = save(program(TEXT, RECIPES), tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rank0\.onnx: is not an ONNX file"):
        load_program(path)


def test_check_accepts_weights_that_are_not_there() -> None:
    check(program(TEXT, RECIPES))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("g (float[2] x) => (float[2] y) { y = NoSuchOp (x) }", onnx.checker.ValidationError),
        ("g (float[2] x) => (float[2] y) { y = Neg (z) }", onnx.checker.ValidationError),
        ("g (float[2] x, int64[2] i) => (float[2] y) { y = Add (x, i) }", onnx.shape_inference.InferenceError),
        ("g (float[2] x) => (float[3] y) { y = Neg (x) }", onnx.shape_inference.InferenceError),
        ("g (float[5, 2] x) => (float[5, 2] y) { y = MatMul (x, w) }", onnx.shape_inference.InferenceError),
    ],
    ids=["unknown op", "unknown input", "mixed types", "wrong output shape", "a weight's shape"],
)
def test_check_refuses(text: str, error: type[Exception]) -> None:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + text)
    weights = {"w": whole("w", 3, 2)}
    if "w)" in text:
        model.graph.initializer.append(program("g () => () {}", weights).model.graph.initializer[0])
    with pytest.raises(error):
        check(Program(model, weights))
