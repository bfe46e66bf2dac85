"""``x * sigmoid(x)`` → ``h * tanh(h) + h`` with ``h = x / 2``: the same function, for sigmoid(x) = (1 + tanh(x / 2)) / 2."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from moecompiler.passes.dtypes import onnx_dtype
from moecompiler.passes.pattern import Match, Op, Var, escaping
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.weights import Recipe


class SiluByTanh(PatternPass):
    """Writes each SiLU with the hyperbolic tangent, for hardware that has no sigmoid."""

    name = "example.silu-by-tanh"
    needs = "nothing"
    must_match = "never: a model may use another activation"
    guarantees = "no SiLU in float32 or float16 is left whose sigmoid nobody else reads"
    pattern = Op("Mul", (Var("x"), Op("Sigmoid", (Var("x"),))), commutative=True)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        """Why a match is not one after all: here, numpy has no such type, or somebody else reads the sigmoid."""
        if onnx_dtype(found.tensors["x"]) not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            return "it is computed neither in float32 nor in float16"
        return escaping(found, graph, kept=(found.nodes[0].outputs[0],))

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        """New nodes write the old output. Their names begin with that of the old one, which says the module."""
        mul, x = found.nodes[0], found.tensors["x"]
        (y,) = mul.outputs
        mul.outputs.clear()
        half = gs.Constant(f"{mul.name}/half", np.array(0.5, x.dtype))
        h, t, product = (gs.Variable(f"{mul.name}/{name}", x.dtype, x.shape) for name in ("h", "t", "product"))
        made = (("Mul", [x, half], h), ("Tanh", [h], t), ("Mul", [h, t], product), ("Add", [product, h], y))
        at = graph.nodes.index(mul)
        graph.nodes[at:at] = [
            gs.Node(op, f"{mul.name}.{index}.{op}", {}, inputs, [output])
            for index, (op, inputs, output) in enumerate(made)
        ]
        return "wrote SiLU with Tanh"
