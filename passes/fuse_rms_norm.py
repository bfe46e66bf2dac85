"""RMS normalization → ``moecompiler::RMSNorm``."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.dtypes import cast_like, onnx_dtype, written_like
from moecompiler.passes.pattern import Const, Match, OneOf, Op, Through, Var, escaping, producer_of, small_constant
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.passes.rewiring import position_of
from moecompiler.plugins.rmsnorm.op import RMS_NORM
from moecompiler.weights import Recipe


def _over_last_axis(node: gs.Node) -> str | None:
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = small_constant(node.inputs[1])
    if axes is None or np.asarray(axes).reshape(-1).tolist() != [-1]:
        return f"it reduces axes {axes}, not the last"
    return None if node.attrs.get("keepdims", 1) == 1 else "it does not keep the reduced axis"


def _is(number: float) -> Const:
    return Const(f"the number {number}", str(number), lambda value: value.size == 1 and float(value.item()) == number)


_WIDE = Var("wide")
_SQUARE = OneOf((Op("Pow", (_WIDE, _is(2.0))), Op("Mul", (_WIDE, _WIDE))))
_SHIFTED = Op(
    "Add",
    (Op("ReduceMean", (_SQUARE,), test=_over_last_axis), Const("epsilon", "one number", lambda value: value.size == 1)),
    commutative=True,
)
_ROOT = Op("Sqrt", (_SHIFTED,))
_INVERSE = OneOf((Op("Reciprocal", (_ROOT,)), Op("Div", (_is(1.0), _ROOT)), Op("Pow", (_SHIFTED, _is(-0.5)))))
_SCALED = OneOf((Op("Mul", (_WIDE, _INVERSE), commutative=True), Op("Div", (_WIDE, _ROOT))))


class FuseRMSNorm(PatternPass):
    """Fuses each RMS normalization, in float32 with casts around it or in the graph's own type, into one op."""

    name = "fuse-rms-norm"
    needs = "constant-folding and clean-up"
    must_match = "once per module whose name ends in norm"
    guarantees = "each norm is one op that computes in float32"
    modules = r"(.+\.)?\w*norm"
    op_names = ("RMSNorm", "AddRMSNorm")
    pattern = Op("Mul", (Var("weight"), Through(("Cast",), _SCALED)), commutative=True)
    ops: ClassVar[tuple[OpSpec, ...]] = (RMS_NORM,)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        weight, y = found.tensors["weight"], found.nodes[0].outputs[0]
        if not isinstance(weight, gs.Constant) or len(weight.shape) != 1:
            return f"the weight {weight.name} is not a constant vector"
        return escaping(found, graph, kept=(y,))

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        last = found.nodes[0]
        (y,) = last.outputs
        last.outputs.clear()
        name = node_name(module_of(last.name), f"RMSNorm_{last.name.rpartition('_')[2]}")
        wide, weight = found.tensors["wide"], found.tensors["weight"]
        x = _before_cast(wide)
        if onnx_dtype(x) != onnx_dtype(weight):
            # a float16 norm in a float32 residual stream, as torch's tracing exporter makes it: all of it in float32
            x = wide
            weight = cast_like(weight, x, graph, node_name(module_of(name), f"Cast_weight_{name.rpartition('_')[2]}"))
        written = written_like(y, x, graph, name)
        node = RMS_NORM.node(name, [x, weight], [written], {"epsilon": found.scalar("epsilon")})
        graph.nodes.insert(position_of(last, graph), node)
        return f"fused {len(found.nodes)} nodes into RMSNorm"


def _before_cast(wide: gs.Tensor) -> gs.Tensor:
    """The op casts to float32 itself, so what it takes is what was cast, if anything was."""
    producer = producer_of(wide)
    return producer.inputs[0] if producer is not None and producer.op == "Cast" else wide
