"""What TensorRT's parser is given: which nodes are plugins, which functions stay, which weights are inputs. No TensorRT."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import Prepared, prepare, serialized
from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program, module_of, weight_tensor
from moecompiler.ops import add_function
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.plugins.rmsnorm.op import RMS_NORM
from moecompiler.weights import Recipe

LIMITS = EngineLimits(4, 16, 32, 64)
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
NORMS = [f"model.layers.{layer}.norm/RMSNorm" for layer in range(3)]


class Library:
    """Plugins for the ops it is given; attention writes its caches in place."""

    def __init__(self, *ops: str):
        self.ops, self.asked = ops, list[tuple[object, ...]]()

    def refusal(self, node: onnx.NodeProto, dims: object, dtype: str, sm: int) -> str | None:
        self.asked.append((node.name, dims, dtype, sm))
        return None if node.op_type in self.ops else "no kernels"

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {1: 6, 2: 7} if op_type == "Attention" else {}

    def register(self) -> None:
        raise AssertionError("nothing is built here")


def norms_program(expert_rows: int = 4) -> Program:
    """Three norms in a row, a product with expert weights, and an initializer that is no weight."""
    weights = {
        "scale": Recipe("float16", (8,)),
        EXPERTS: Recipe("float16", (2, 8, expert_rows)),
        "first_row": Recipe("int64", (1,), values=(3,)),
    }
    nodes, previous = [], "x"
    for layer, name in enumerate(NORMS):
        nodes.append(helper.make_node("RMSNorm", [previous, "scale"], [f"y{layer}"], name, domain=DOMAIN, epsilon=1e-5))
        previous = f"y{layer}"
    nodes.append(helper.make_node("MatMul", [previous, EXPERTS], ["products"], "model.layers.0.mlp/MatMul"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", "sequence", 8])],
        [helper.make_tensor_value_info("products", TensorProto.FLOAT16, None)],
        [*(weight_tensor(n, r) for n, r in weights.items()), numpy_helper.from_array(np.ones(2, np.float32), "ones")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    add_function(model, RMS_NORM)
    return Program(model, weights)


def prepared(switches: str, *ops: str, program: Program | None = None, moe_weights: str = "auto") -> Prepared:
    settings = BuildSettings(LIMITS, parse_plugins(switches), moe_weights)
    return prepare(program or norms_program(), settings, "float16", 90, Library(*ops))


def functions_of(result: Prepared) -> list[str]:
    return [function.name for function in result.program.model.functions]


def test_on_drops_the_function() -> None:
    """The parser inlines whatever has a function, registered plugin or not."""
    result = prepared("on", "RMSNorm")
    assert list(result.plugins) == NORMS
    assert functions_of(result) == []
    for node in result.program.model.graph.node[:3]:
        marks = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert marks["plugin_namespace"] == b"moecompiler"
        assert marks["plugin_version"] == b"1"
        assert marks["epsilon"] == pytest.approx(1e-5)


def test_off_inlines_the_bodies() -> None:
    """With names that keep their module, and values that no longer meet the graph's: a body has a ``y`` too."""
    result, program = prepared("off", "RMSNorm"), norms_program()
    assert (result.plugins, functions_of(result)) == ({}, [])
    nodes = result.program.model.graph.node
    assert {module_of(node.name) for node in nodes} == {*(module_of(name) for name in NORMS), "model.layers.0.mlp"}
    assert len({node.name for node in nodes}) == len(nodes) == 3 * len(program.model.functions[0].node) + 1
    outputs = [name for node in nodes for name in node.output]
    assert len(set(outputs)) == len(outputs)


def test_one_of_three_is_off() -> None:
    """It is inlined, between two nodes that are looked up among the plugins; both kinds are a parser's to know by name."""
    result = prepared("on,@layers.1=off", "RMSNorm")
    assert list(result.plugins) == [NORMS[0], NORMS[2]]
    ours = [node for node in result.program.model.graph.node if node.domain == DOMAIN]
    assert [(node.name, node.op_type) for node in ours] == [(NORMS[0], "RMSNormPlugin"), (NORMS[2], "RMSNormPlugin")]
    assert functions_of(result) == []
    inlined = [node for node in result.program.model.graph.node if module_of(node.name) == module_of(NORMS[1])]
    assert [node.op_type for node in inlined][:2] == ["Cast", "Constant"]
    assert inlined[-1].output == ["y1"]


def test_the_program_given_stays_as_it_was() -> None:
    program = norms_program()
    before = program.model.SerializeToString()
    prepared("on", "RMSNorm", program=program, moe_weights="external")
    assert program.model.SerializeToString() == before


def test_no_plugin_that_fits() -> None:
    """``auto`` runs the body and says so once; ``on`` is refused, with the node."""
    result = prepared("auto")
    assert result.plugins == {}
    assert result.notes == ("RMSNorm runs as its plain operators: no kernels",)
    with pytest.raises(UserError, match=r"model.layers.0.norm/RMSNorm \(RMSNorm\) cannot be a plugin: no kernels"):
        prepared("on")
    with pytest.raises(UserError, match="cannot be a plugin"):
        prepared("rmsnorm@layers.2=on")


def test_without_body_or_plugin() -> None:
    program = norms_program()
    del program.model.functions[:]
    shape = ["batch", "sequence", 8]  # which no function tells any more
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("y0", "y1", "y2")]
    program.model.graph.value_info.extend(values)
    with pytest.raises(UserError, match="backend tensorrt cannot run RMSNorm: no kernels"):
        prepared("auto", program=program)
    assert list(prepared("off", "RMSNorm", program=program).plugins) == NORMS  # there is nothing else to run


def test_misspelt_places_are_noted() -> None:
    assert prepared("moe@layers.7=off", "RMSNorm").notes == ("--plugins moe@layers.7=off fits no node of the graph",)


def test_plain_graphs_have_no_plugins_to_insist_on() -> None:
    program = norms_program()
    del program.model.graph.node[:3]
    with pytest.raises(UserError, match="the graph has no fused ops; compile with --pipeline plugins"):
        prepared("on", "RMSNorm", program=program)
    assert "no fused ops, so nothing runs as a plugin" in prepared("auto", "RMSNorm", program=program).notes[0]
    assert prepared("off", "RMSNorm", program=program).notes == ()


def test_the_library_is_told_shapes() -> None:
    library = Library("RMSNorm")
    prepare(norms_program(), BuildSettings(LIMITS), "float16", 89, library)
    assert library.asked == [(name, ((-1, -1, 8), (8,)), "float16", 89) for name in NORMS]


@pytest.mark.parametrize(
    ("moe_weights", "rows", "bound"),
    [("external", 4, True), ("engine", 4, False), ("auto", 4, False), ("auto", 1 << 26, True)],
)
def test_expert_weights(moe_weights: str, rows: int, bound: bool) -> None:
    """Bound weights are inputs, the others initializers; ``auto`` binds from a gigabyte on."""
    result = prepared("off", program=norms_program(rows), moe_weights=moe_weights)
    graph = result.program.model.graph
    assert set(result.bound) == ({EXPERTS} if bound else set())
    assert [value.name for value in graph.input] == ["x", *([EXPERTS] if bound else [])]
    assert {tensor.name for tensor in graph.initializer} == {"scale", "first_row", "ones", EXPERTS} - set(result.bound)
    assert set(result.program.weights) == {"scale", EXPERTS} - set(result.bound)


def test_what_is_written() -> None:
    """Baked weights point into the file beside the graph; literals are in the graph."""
    model = onnx.load_from_string(serialized(prepared("off", moe_weights="external"), "some.file"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert {pair.key: pair.value for pair in tensors["scale"].external_data}["location"] == "some.file"
    assert numpy_helper.to_array(tensors["first_row"]).tolist() == [3]


def test_caches_written_in_place() -> None:
    """Only where both ends are the graph's own, and the node is a plugin."""
    names = [value.name for value in ATTENTION.inputs]
    outputs = [value.name for value in ATTENTION.outputs]
    attributes = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "window": 0}
    node = helper.make_node(
        "Attention", names, outputs, "model.layers.0.self_attn/Attention", domain=DOMAIN, **attributes
    )
    copy = helper.make_node("Identity", ["given_value"], ["past_value"], "model/Identity")
    sizes = {"query_size": 32, "key_size": 16, "head_dim": 8, "kv_heads": 2, "slots": 32, "1": 1}
    values = {
        value.name: helper.make_tensor_value_info(
            value.name,
            TensorProto.INT64 if value.type == "int64" else TensorProto.FLOAT16,
            [sizes.get(dim, dim) for dim in value.dims],
        )
        for value in (*ATTENTION.inputs, *ATTENTION.outputs)
    }
    given = helper.make_tensor_value_info("given_value", TensorProto.FLOAT16, ["batch", 2, 32, 8])
    inputs = [*(values[name] for name in names[:-1]), given]
    graph = helper.make_graph([copy, node], "g", inputs, [values[name] for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    add_function(model, ATTENTION)
    assert prepared("on", "Attention", program=Program(model)).aliases == {"present_key": "past_key"}
    assert prepared("off", "Attention", program=Program(model)).aliases == {}
