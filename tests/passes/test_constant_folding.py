"""``ConstantFolding``: what it computes, what it does to weights without reading them, and what it leaves alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import check_pass, facts, program, run, whole
from onnx import helper, numpy_helper
from readers import ArrayReader

from moecompiler.graph import Program
from moecompiler.passes.constant_folding import LARGEST_FOLDED_BYTES, ConstantFolding
from moecompiler.pipeline import Change, apply
from moecompiler.weights import Recipe, materialize

WEIGHTS = ArrayReader(
    {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "e": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    }
)

# name: (graph, the graph that becomes of it, what and which node)
FOLDED = {
    "Constant": (
        """g (float[2] x) => (float[2] y)
        { ["c"] c = Constant <value = float[2] {1.0, 2.0}> () ["y"] y = Add (x, c) }""",
        """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}> { ["y"] y = Add (x, c) }""",
        ["folded Constant: c"],
    ),
    "Constant of a number": (
        """g (float[2] x) => (float[2] y)
        { ["c"] c = Constant <value_float = 2.5> () ["y"] y = Mul (x, c) }""",
        """g (float[2] x) => (float[2] y) <float c = {2.5}> { ["y"] y = Mul (x, c) }""",
        ["folded Constant: c"],
    ),
    "a chain": (
        """g (float[N, 4] x) => (float[2, M] y) <int64[1] two = {2}, int64[1] one = {1}>
        { ["a"] a = Neg (one) ["b"] b = Concat <axis = 0> (two, a) ["y"] y = Reshape (x, b) }""",
        """g (float[N, 4] x) => (float[2, M] y) <int64[2] b = {2, -1}> { ["y"] y = Reshape (x, b) }""",
        ["folded Neg: a", "folded Concat: b"],
    ),
    "one of two operands": (
        """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}>
        { ["a"] a = Add (c, c) ["b"] b = Add (x, c) ["y"] y = Mul (a, b) }""",
        """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}, float[2] a = {2.0, 4.0}>
        { ["b"] b = Add (x, c) ["y"] y = Mul (a, b) }""",
        ["folded Add: a"],
    ),
    "Shape of a constant": (
        """g (float[6] x) => (float[2, 3] y) <float[2, 3] c = {1, 2, 3, 4, 5, 6}>
        { ["s"] s = Shape (c) ["y"] y = Reshape (x, s) }""",
        """g (float[6] x) => (float[2, 3] y) <int64[2] s = {2, 3}> { ["y"] y = Reshape (x, s) }""",
        ["folded Shape: s"],
    ),
}
# what looks like it could be folded
KEPT = {
    "data": """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}> { ["a"] a = Add (x, c) ["y"] y = Neg (a) }""",
    "chance": """g (float[2] x) => (float[2] y)
        { ["a"] a = RandomNormal <shape = [2], seed = 1.0> () ["y"] y = Add (x, a) }""",
    "chance in the shape of a constant": """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}>
        { ["a"] a = RandomUniformLike <seed = 1.0> (c) ["y"] y = Add (x, a) }""",
    "what writes a graph output": """g (float[2] x) => (float[2] y, float[2] a) <float[2] c = {1.0, 2.0}>
        { ["a"] a = Neg (c) ["y"] y = Add (x, a) }""",
    "another domain": """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}>
        { ["a"] a = moecompiler.AllReduce <group = [0, 1]> (c) ["y"] y = Add (x, a) }""",
    "two outputs": """g (float[1] x) => (float[1] y) <float[2] c = {1.0, 2.0}>
        { ["a"] a, b = Split <num_outputs = 2> (c) ["b"] d = Add (x, a) ["y"] y = Add (d, b) }""",
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    before, after, changed = FOLDED[name]
    check_pass(ConstantFolding(), program(before), program(after), changed)


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    check_pass(ConstantFolding(), program(KEPT[name]), program(KEPT[name]), [])


@pytest.mark.parametrize(
    ("name", "number", "numpy_dtype"), [("bfloat16", 16, ml_dtypes.bfloat16), ("float16", 10, np.float16)]
)
def test_folded_to_16_bits(name: str, number: int, numpy_dtype: type) -> None:
    """Constants of types that numpy may lack keep type and value through several nodes."""
    before = program(
        f"""g ({name}[3] x) => ({name}[3] y) <float[3] c = {{1.0, 3.14159, -0.001}}, int64[1] s = {{3}}>
        {{ ["a"] a = Cast <to = {number}> (c) ["b"] b = Reshape (a, s) ["y"] y = Add (x, b) }}"""
    )
    after, result = apply(ConstantFolding(), before)
    assert result.matches == 2
    (tensor,) = after.model.graph.initializer
    assert (tensor.name, tensor.data_type) == ("b", number)
    wanted = np.array([1.0, 3.14159, -0.001], np.float32).astype(numpy_dtype)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), wanted)


@pytest.mark.parametrize("name", FOLDED)
def test_computes_the_same(name: str) -> None:
    before = program(FOLDED[name][0])
    after, _ = apply(ConstantFolding(), before)
    shape = [dim.dim_value or 3 for dim in before.model.graph.input[0].type.tensor_type.shape.dim]
    feeds = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 1.5}
    for wanted, got in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("weight", "shape", "perm", "attribute"),
    [
        ("w", (2, 3), (1, 0), ""),
        ("w", (2, 3), (1, 0), "<perm = [1, 0]>"),
        ("e", (2, 3, 4), (0, 2, 1), "<perm = [0, 2, 1]>"),
        ("e", (2, 3, 4), (1, 2, 0), "<perm = [1, 2, 0]>"),
        ("e", (2, 3, 4), (2, 1, 0), ""),
    ],
)
def test_a_weight_is_transposed_by_reference(
    weight: str, shape: tuple[int, ...], perm: tuple[int, ...], attribute: str
) -> None:
    """The node goes, and the recipe of the weight, under a new name, is that of the transposed tensor."""
    turned = [shape[axis] for axis in perm]
    sizes = ", ".join(map(str, turned))
    recipe = whole(weight, *shape)
    before = program(
        f"""g (float[{sizes}] x) => (float[{sizes}] y)
        {{ ["t"] t = Transpose {attribute} ({weight}) ["y"] y = Add (x, t) }}""",
        {weight: recipe},
    )
    after = program(
        f"""g (float[{sizes}] x) => (float[{sizes}] y) {{ ["y"] y = Add (x, "{weight}.T") }}""",
        {f"{weight}.T": recipe.transposed(perm)},
    )
    check_pass(ConstantFolding(), before, after, ["transposed a weight by reference: t"])
    feeds = {"x": np.ones(turned, np.float32)}
    np.testing.assert_array_equal(run(after, feeds, WEIGHTS)[0], run(before, feeds, WEIGHTS)[0])


def test_a_weight_transposed_there_and_back() -> None:
    before = program(
        """g (float[2, 3] x) => (float[2, 3] y)
        { ["t"] t = Transpose (w) ["u"] u = Transpose (t) ["y"] y = Add (x, u) }""",
        {"w": whole("w", 2, 3)},
    )
    after = program(
        """g (float[2, 3] x) => (float[2, 3] y) { ["y"] y = Add (x, "w.T.T") }""", {"w.T.T": whole("w", 2, 3)}
    )
    both = ["transposed a weight by reference: t", "transposed a weight by reference: u"]
    check_pass(ConstantFolding(), before, after, both)


LITERAL = Recipe("int64", (2, 1), values=(3, 4))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (
            """g (float[3, 2] x) => (float[3, 2] y, float[2, 3] z)
            { ["t"] t = Transpose (w) ["y"] y = Add (x, t) ["z"] z = Neg (w) }""",
            {"w": whole("w", 2, 3)},
        ),
        (
            """g (float[3, 2] x) => (float[3, 2] y)
            { ["t"] t = Transpose (w) ["u"] u = Transpose (w) ["v"] v = Add (t, u) ["y"] y = Add (x, v) }""",
            {"w": whole("w", 2, 3)},
        ),
        (
            """g (float[3, 2] x) => (float[3, 2] y, float[3, 2] t)
            { ["t"] t = Transpose (w) ["y"] y = Add (x, t) }""",
            {"w": whole("w", 2, 3)},
        ),
        (
            """g (int64[1, 2] x) => (int64[1, 2] y) { ["t"] t = Transpose (ids) ["y"] y = Add (x, t) }""",
            {"ids": LITERAL},
        ),
        (
            """g (float[2, 3] x) => (float[2, 3] y) { ["n"] n = Neg (w) ["y"] y = Add (x, n) }""",
            {"w": whole("w", 2, 3)},
        ),
        (
            """g (float[2, 3] x) => (float[2, 3] y) <float c = {2.0}> { ["n"] n = Mul (w, c) ["y"] y = Add (x, n) }""",
            {"w": whole("w", 2, 3)},
        ),
    ],
    ids=["read elsewhere", "transposed twice", "graph output", "literal", "computed", "computed with a constant"],
)
def test_weights_are_otherwise_left_alone(text: str, weights: dict[str, Recipe]) -> None:
    check_pass(ConstantFolding(), program(text, weights), program(text, weights), [])


def with_constant(values: np.ndarray, *nodes: onnx.NodeProto) -> Program:
    """A graph over the constants ``c``, all of ``values``, and ``s``, its shape with a leading 3."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", ["x", "a"], ["y"], name="y")],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(values, "c"),
            numpy_helper.from_array(np.array([3, *values.shape], np.int64), "s"),
        ],
    )
    return Program(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_results_larger_than_what_they_are_made_of() -> None:
    """Folded only up to a size; a result no larger than its operands is always folded."""
    elements = LARGEST_FOLDED_BYTES // 4
    expand = helper.make_node("Expand", ["c", "s"], ["a"], name="a")
    exactly, beyond = np.ones(elements // 3, np.float32), np.ones(elements // 3 + 1, np.float32)
    assert apply(ConstantFolding(), with_constant(exactly, expand))[1].matches == 1
    after, result = apply(ConstantFolding(), with_constant(beyond, expand))
    assert result.matches == 0
    assert [node.name for node in after.model.graph.node] == ["a", "y"]
    large = np.ones(4 * elements, np.float32)
    assert apply(ConstantFolding(), with_constant(large, helper.make_node("Neg", ["c"], ["a"])))[1].matches == 1


def test_recipes_are_not_read() -> None:
    """Expert stacks are only described: a weight of any size is transposed at no cost."""
    huge = whole("huge", 1 << 20, 1 << 20)
    before = program(
        """g (float[1, 1048576] x) => (float[1, 1048576] y) { ["t"] t = Transpose (w) ["y"] y = MatMul (x, t) }""",
        {"w": huge},
    )
    after, result = apply(ConstantFolding(), before)
    assert result.matches == 1
    assert after.weights == {"w.T": huge.transposed((1, 0))}
    assert facts(after)["initializers"] == {"w.T": ("weight", onnx.TensorProto.FLOAT, [1 << 20, 1 << 20])}
    small = apply(
        ConstantFolding(),
        program("g (float[3, 2] x) => (float[3, 2] y) { t = Transpose (w) y = Add (x, t) }", {"w": whole("w", 2, 3)}),
    )[0]
    np.testing.assert_array_equal(materialize(small.weights["w.T"], WEIGHTS), WEIGHTS.arrays["w"].T)


def test_changes_name_their_module() -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] c = {1.0, 2.0}>
    { ["model.norm/Neg_1"] a = Neg (c) ["/y"] y = Add (x, a) }"""
    (change,) = apply(ConstantFolding(), program(text))[1].changes
    assert change == Change("folded Neg", "model.norm/Neg_1", "model.norm", 1)
