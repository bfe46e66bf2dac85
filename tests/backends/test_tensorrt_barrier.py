"""Where the sum over experts is kept apart for TensorRT's compiler. No TensorRT."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from moecompiler.backends.tensorrt_barrier import add_barriers, moe_without_plugin
from moecompiler.config import NormalizationMode
from moecompiler.graph import DOMAIN, OPSET
from moecompiler.ops import OpSpec, add_function
from moecompiler.plugins.moe.op import moe_spec
from moecompiler.plugins.quantized.dequantize import forms
from moecompiler.plugins.quantized.moe import quantized_moe_spec

SPECS = [
    *(moe_spec(mode, 2) for mode in NormalizationMode),
    *(quantized_moe_spec(NormalizationMode.RENORMALIZE, 2, form) for form in forms()),
]
NAME = "model.layers.0.mlp/MoE_7"


def inlined(spec: OpSpec) -> onnx.ModelProto:
    """A node of ``spec`` and its body in its place, with the names that the backend gives it; then a sum of another kind."""
    attributes = {"top_k": 2, "normalization_mode": 1}
    node = helper.make_node(spec.name, [v.name for v in spec.inputs], ["y"], NAME, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(n, attributes.get(n, 64)) for n in spec.attributes)
    names = [v.name for v in spec.inputs]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in names]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    add_function(model, spec)
    model = onnx.inliner.inline_local_functions(model)
    for index, inner in enumerate(model.graph.node):
        inner.name = f"{NAME}.{inner.op_type}_{index}"
    other = [
        helper.make_node("Mul", ["y", "y"], ["squares"], "model.norm/Norm_1.Mul_0"),
        helper.make_node("ReduceSum", ["squares"], ["total"], "model.norm/Norm_1.ReduceSum_1"),
    ]
    model.graph.node.extend(other)
    return model


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_one_behind_the_sum_over_experts(spec: OpSpec) -> None:
    """Between the sum and its rounding to the op's own type; nothing else changes."""
    model = inlined(spec)
    before = [node.SerializeToString() for node in model.graph.node]
    add_barriers(model, [NAME])
    (barrier,) = [node for node in model.graph.node if node.op_type == "BarrierPlugin"]
    made = {output: node for node in model.graph.node for output in node.output}
    (reader,) = [node for node in model.graph.node if barrier.output[0] in node.input]
    assert (made[barrier.input[0]].op_type, reader.op_type) == ("ReduceSum", "CastLike")
    assert made[made[barrier.input[0]].input[0]].op_type == "Mul"
    reader.input[0] = barrier.input[0]
    assert [node.SerializeToString() for node in model.graph.node if node.name != barrier.name] == before
    assert {each.name: helper.get_attribute_value(each) for each in barrier.attribute} == {
        "plugin_namespace": b"moecompiler",
        "plugin_version": b"1",
    }


def test_none_where_not_asked() -> None:
    model = inlined(SPECS[0])
    before = model.SerializeToString()
    add_barriers(model, ["model.layers.1.mlp/MoE_7"])
    assert model.SerializeToString() == before


def test_who_needs_one() -> None:
    """Experts without a plugin, where there is another plugin; a graph without any is one region, and builds."""
    nodes = [
        helper.make_node("MoE", ["x"], ["a"], "a", domain=DOMAIN),
        helper.make_node("MoEInt8", ["a"], ["b"], "b", domain=DOMAIN),
        helper.make_node("RMSNorm", ["b"], ["c"], "c", domain=DOMAIN),
        helper.make_node("AllReduce", ["c"], ["d"], "d", domain=DOMAIN),
        helper.make_node("MoE", ["d"], ["e"], "e"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert moe_without_plugin(model, ["d"]) == ("a", "b")
    assert moe_without_plugin(model, ["a", "d"]) == ("b",)
    assert moe_without_plugin(model, []) == ()
