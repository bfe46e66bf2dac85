"""What changed between two graphs, as text: complete, and what many layers share written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import HEADER, program, whole
from onnx import numpy_helper

from moecompiler.debugging.diff import Edit, GraphDiff, diff, merged
from moecompiler.debugging.diff_text import diff_text, ranges
from moecompiler.debugging.held import Side
from moecompiler.graph import Program
from moecompiler.weights import Recipe, joined

NOWHERE = Path("nowhere")

GRAPH = """g (float[n, 4] x) => (float[n, 4] y) <float[1] two = {2}>
    { ["model.a/Mul_0"] h = Mul (x, two) ["model.b/Neg_1"] y = Neg (h) }"""


def changes(before: str | Program, after: str | Program) -> GraphDiff:
    sides = [Side(each if isinstance(each, Program) else program(each), NOWHERE) for each in (before, after)]
    return diff(*sides)


def test_what_changed_stands_under_its_module() -> None:
    after = """g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) <float[1] two = {3}>
        { ["model.a/Mul_0"] h = Mul (x, two) ["model.a/Abs_2"] z = Abs (h) ["model.b/Identity_1"] y = Identity (h) }"""
    found = changes(GRAPH, after)
    assert not found.equal
    assert diff_text(found).splitlines() == [
        "model.a: 1 added, 1 changed",
        "  - Mul_0: h float[n, 4] = Mul(x, [2.0])",
        "  + Mul_0: h float[n, 4] = Mul(x, [3.0])",
        "  + Abs_2: z float[n, 4] = Abs(h)",
        "model.b: 1 removed, 1 added",
        "  - Neg_1: y float[n, 4] = Neg(h)",
        "  + Identity_1: y float[n, 4] = Identity(h)",
        "nodes: 2 -> 3 (+1)",
        "  Abs           0 -> 1      +1",
        "  Identity      0 -> 1      +1",
        "  Neg           1 -> 0      -1",
        "  as many as before: Mul 1",
        "inputs: the same",
        "outputs: 1 added",
        "  + z float[n, 4]",
        "weights: the same",
        "functions: the same",
        "versions: the same",
    ]


def test_what_makes_no_difference() -> None:
    """Order, names of small constants, types that one file alone notes, and names of nodes."""
    given = program("g (float[n] x) => (float[n] y) { [a] h = Abs (x) [b] k = Neg (x) [c] y = Add (h, k) }")
    other = onnx.ModelProto()
    other.CopyFrom(given.model)
    first = other.graph.node.pop(0)
    other.graph.node.insert(1, first)
    del other.graph.value_info[:]
    assert changes(given, Program(other)).equal
    assert changes(GRAPH, GRAPH.replace("two", "deux")).equal
    assert diff_text(changes(GRAPH, GRAPH)).startswith("nodes: 2, the same\n")


def layers(*bodies: str) -> str:
    """Layers one after another, each ``{} = Op ({})``."""
    nodes = [
        body.format(i, 10 * i + 3, f"h{i + 1}" if i + 1 < len(bodies) else "y", f"h{i}" if i else "x")
        for i, body in enumerate(bodies)
    ]
    return f"g (float[2] x, float[2] w) => (float[2] y) {{ {' '.join(nodes)} }}"


TWO_NODES = '["model.layers.{0}.mlp/Mul_{1}"] m{1} = Mul ({3}, w) ["model.layers.{0}.mlp/Neg_{1}"] {2} = Neg (m{1})'


def test_alike_layers_are_written_once() -> None:
    """Alike are those that differ in numbers of names alone: layer 2 is another, though as many of its nodes changed."""
    plain = '["model.layers.{0}.mlp/Add_{1}"] {2} = Add ({3}, w)'
    text = diff_text(
        changes(layers(*[TWO_NODES] * 6), layers(plain, plain, plain.replace("{3}, w", "w, {3}"), *[plain] * 3))
    )
    heads = [line for line in text.splitlines() if line.startswith("model.")]
    assert heads == [
        "model.layers.0.mlp: 2 removed, 1 added",  # it reads the graph's input
        "model.layers.1,3..4.mlp: 2 removed, 1 added",
        "model.layers.2.mlp: 2 removed, 1 added",
        "model.layers.5.mlp: 2 removed, 1 added",  # it writes the graph's output
    ]
    assert "- Mul_13: m13 float[2] = Mul(h1, w)" in text
    assert "Mul_33" not in text


def test_a_number_that_is_no_name_s_keeps_layers_apart() -> None:
    one = '["model.layers.{0}.a/Add_{1}"] {2} = Add ({3}, w)'
    text = diff_text(
        changes(
            layers(*[one.replace("Add (", "Concat <axis=0> (")] * 4),
            layers(*[one] * 2, '["model.layers.{0}.a/Add_{1}"] {2} = Concat <axis=-1> ({3}, w)', one),
        )
    )
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("model.layers.")] == [
        "model.layers.0.a",
        "model.layers.1.a",
        "model.layers.2.a",
        "model.layers.3.a",
    ]


READS = '["model.layers.{0}.a/Add_{1}"] {2} = Add ({3}, %s)'


@pytest.mark.parametrize(
    ("odd", "alike"),
    [
        ("model.layers.{0}.w", True),
        ("model.layers.0.w", False),  # another layer's weight
        ("model.layers.{0}.experts.4.w", True),
        ("model.layers.{0}.experts.5.w", False),
        ("val_{1}", True),
    ],
)
def test_what_tells_layers_apart(odd: str, alike: bool) -> None:
    """Layer 2 of 1 to 3 reads what the others read, but for the layer's own number, or something else."""
    usual = odd.replace("5", "4") if "experts" in odd else "val_{1}" if "val" in odd else "model.layers.{0}.w"
    before = layers(*[READS % "w"] * 5)
    after = layers(*[READS % f'"{name}"' for name in (usual, usual, odd, usual, usual)])
    names = {f"model.layers.{i}.{rest}" for i in range(5) for rest in ("w", "experts.4.w", "experts.5.w")}
    names |= {f"val_{10 * i + 3}" for i in range(5)}
    inputs = "".join(f', float[2] "{name}"' for name in sorted(names))
    text = diff_text(changes(*(each.replace("float[2] w)", f"float[2] w{inputs})") for each in (before, after))))
    heads = [line.split(":")[0] for line in text.splitlines() if line.startswith("model.layers.")]
    assert ("model.layers.1..3.a" in heads) == alike, heads
    assert ("model.layers.2.a" in heads) != alike


@pytest.mark.parametrize(
    ("usual", "odd"),
    [
        ("Abs_1: y1 int64[2] = Abs(x1)", "Abs_1: y1 int32[2] = Abs(x1)"),
        ("Abs_1: y1 int64[2] = own::OpV2(x1)", "Abs_1: y1 int64[2] = own::OpV3(x1)"),
        ("Add_1: y1 int64[2] = Add(x1, x1)", "Add_1: y1 int64[2] = Add(x1, x2)"),
        ("Add_1: y1 int64[2] = Add(x1, 2)", "Add_1: y1 int64[2] = Add(x1, 3)"),
    ],
)
def test_what_no_name_hides(usual: str, odd: str) -> None:
    modules = {
        f"model.layers.{i}.a": (Edit(None, text),) for i, text in enumerate((usual, odd, usual.replace("1", "11")))
    }
    heads = [line for line in diff_text(GraphDiff(modules, {})).splitlines() if line.startswith("model")]
    assert heads == ["model.layers.0,2.a: 1 added", "model.layers.1.a: 1 added"]


def test_ranges() -> None:
    assert ranges([5, 0, 1, 2, 3, 7]) == "0..3,5,7"


@pytest.mark.parametrize(
    ("old", "new", "both"),
    [("abc", "abc", "abc"), ("abc", "xabyc", "xabyc"), ("abc", "cxa", "abcx"), ("", "ab", "ab"), ("ab", "", "ab")],
)
def test_merged(old: str, new: str, both: str) -> None:
    assert "".join(merged(list(old), list(new))) == both


PRODUCT = 'g (float[n, 8] x) => (float[n, 4] y) { ["model.a/MatMul_0"] y = MatMul (x, %s) }'


def weighted(**recipes: Recipe) -> Program:
    (name,) = recipes
    return program(PRODUCT % name, recipes)


def test_weights_by_recipe() -> None:
    """By what they are made of; one that is another one turned says so."""
    before = weighted(w=whole("ckpt.w", 8, 4))
    assert changes(before, weighted(w=whole("ckpt.w", 8, 4))).equal
    found = changes(before, weighted(w=whole("ckpt.v", 8, 4)))
    assert not found.modules
    assert (
        "weights: 1 changed\n  - w float[8, 4] of ckpt.w[0:8, 0:4]\n  + w float[8, 4] of ckpt.v[0:8, 0:4]\n"
        in diff_text(found)
    )
    halves = [joined([whole(f"ckpt.{name}", 4, 4) for name in names], axis=0) for names in ("ab", "ac")]
    text = diff_text(changes(*(weighted(w=each) for each in halves)))
    assert "  - w float[8, 4] of 2 pieces, number 2: ckpt.b[0:4, 0:4] put at [4, 0]\n" in text
    assert "  + w float[8, 4] of 2 pieces, number 2: ckpt.c[0:4, 0:4] put at [4, 0]\n" in text
    turned = whole("ckpt.w", 4, 8)
    found = changes(program(PRODUCT % "w", {"w": turned}), program(PRODUCT % "t", {"t": turned.transposed((1, 0))}))
    assert "  + t float[8, 4] = w transposed [1, 0]\n" in diff_text(found)


def stored(folder: Path, name: str, values: np.ndarray, *, external: bool = True) -> Side:
    model = onnx.parser.parse_model(HEADER + PRODUCT % "w")
    model.graph.initializer.append(numpy_helper.from_array(values, "w"))
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / name, save_as_external_data=external, location=f"{name}.data", size_threshold=0)
    return Side.read(folder / name)


def test_weights_that_have_data_are_compared_by_it(tmp_path: Path) -> None:
    """Wherever it lies."""
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    given = stored(tmp_path / "a", "a.onnx", values)
    assert diff(given, stored(tmp_path / "b", "b.onnx", values, external=False)).equal
    values[7, 3] += 1
    found = diff(given, stored(tmp_path / "c", "c.onnx", values))
    assert not found.equal
    assert "- w float[8, 4] of data sha256 " in diff_text(found)


def test_data_that_are_not_there_are_no_equal_data(tmp_path: Path) -> None:
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    given, other = (stored(tmp_path / name, "a.onnx", values) for name in ("a", "b"))
    (tmp_path / "b" / "a.onnx.data").unlink()
    found = diff(given, other)
    assert "note: the data of 1 weights is not compared" in diff_text(found)
    assert found.to_json()["notes"]


def test_modules_that_an_exporter_notes(tmp_path: Path) -> None:
    """A file before passes and after: nodes have other names, and are the same by what they write."""
    node = onnx.helper.make_node("Neg", ["x"], ["y"], name="node_neg")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model.norm', 'neg']")
    ours = onnx.helper.make_node("Neg", ["x"], ["y"], name="model.norm/Neg_0")
    values = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    sides = []
    for each in (node, ours, onnx.helper.make_node("Abs", ["x"], ["y"], name="model.norm/Abs_0")):
        graph = onnx.helper.make_graph([each], "g", values[:1], values[1:])
        path = tmp_path / f"{len(sides)}.onnx"
        onnx.save(onnx.helper.make_model(graph, ir_version=10), path)
        sides.append(Side.read(path))
    assert diff(sides[0], sides[1]).equal
    assert list(diff(sides[0], sides[2]).to_json()["modules"]) == ["model.norm"]


def test_json_has_everything() -> None:
    data = changes(GRAPH, GRAPH.replace("Neg (h)", "Abs (h)")).to_json()
    edits: Mapping[str, object] = {
        "removed": ["Neg_1: y float[n, 4] = Neg(h)"],
        "added": ["Neg_1: y float[n, 4] = Abs(h)"],
        "changed": [],
    }
    assert data["modules"] == {"model.b": edits}
    assert (data["equal"], data["nodes"], data["ops"]["Abs"]) == (False, (2, 2), [0, 1])
