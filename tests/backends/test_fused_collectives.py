"""Ops in whose bodies ranks exchange something, as TensorRT gets them: one plugin, or the collective's and plain operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import pytest
from onnx import parser

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_program import prepare
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.ops import add_function
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.rmsnorm.op import ALL_REDUCE_ADD_RMS_NORM

GRAPH = """
<ir_version: 10, opset_import: ["": 21, "moecompiler": 1]>
g (float16[b, 8] r, float16[b, 8] branch) => (float16[b, 8] y, float16[b, 8] x)
<float16[8] w = {1, 2, 3, 4, 5, 6, 7, 8}>
{ ["layers.1/AllReduce_3"] y, x = moecompiler.AllReduceAddRMSNorm<epsilon: float = 0.01, group: ints = [0, 1]>(r, branch, w) }
"""


class Library:
    """Plugins for all but what it ``lacks``."""

    def __init__(self, lacks: str = ""):
        self.lacks = lacks

    def refusal(self, node: onnx.NodeProto, dims: Any, dtype: str, sm: int) -> str | None:
        return "there is none" if node.op_type == self.lacks else None

    def aliases(self, op_type: str) -> Mapping[int, int]:
        return {}


def prepared(switches: str, lacks: str = "") -> Any:
    model = parser.parse_model(GRAPH)
    add_function(model, ALL_REDUCE_ADD_RMS_NORM)
    settings = BuildSettings(EngineLimits(1, 1, 1, 8), parse_plugins(switches))
    return prepare(Program(model), settings, "float16", 90, Library(lacks))  # type: ignore[arg-type]


@pytest.mark.parametrize("switches", ["on", "auto", "off,allreduce=on", "moe=off"])
def test_one_plugin(switches: str) -> None:
    made = prepared(switches)
    assert made.plugins == {"layers.1/AllReduce_3": "AllReduceAddRMSNorm"}
    (node,) = made.program.model.graph.node
    assert node.op_type == "AllReduceAddRMSNormPlugin"
    assert {each.name for each in node.attribute} == {"epsilon", "group", "plugin_namespace", "plugin_version"}
    assert not made.notes


@pytest.mark.parametrize(
    ("switches", "lacks"), [("off", ""), ("allreduce=off", ""), ("@layers.1=off", ""), ("auto", "AllReduceAddRMSNorm")]
)
def test_the_collective_alone(switches: str, lacks: str) -> None:
    """The body's other nodes are plain operators; all are named after the op."""
    made = prepared(switches, lacks)
    assert made.plugins == {"layers.1/AllReduce_3.AllReduce_0": "AllReduce"}
    nodes = made.program.model.graph.node
    assert [node.op_type for node in nodes[:2]] == ["AllReducePlugin", "Add"]
    assert len(nodes) == len(ALL_REDUCE_ADD_RMS_NORM.function().node)
    assert all(node.name.startswith("layers.1/AllReduce_3.") for node in nodes)
    assert not any("fits no node" in note for note in made.notes)


def test_insisted_on() -> None:
    with pytest.raises(UserError, match=r"AllReduce_3 \(AllReduceAddRMSNorm\) cannot be a plugin: there is none"):
        prepared("on", "AllReduceAddRMSNorm")
