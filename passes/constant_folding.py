"""Constant folding: what can be computed now is; weights are moved by reference, never read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import OPSET, module_of, weight_tensor
from moecompiler.passes.known_sizes import known_sizes
from moecompiler.passes.rewiring import NOT_PURE, is_any_of, redirect_readers
from moecompiler.pipeline import Rewrite
from moecompiler.weights import Recipe

# A constant that is larger than what it is made of only costs memory and time to load (an expanded mask, say).
LARGEST_FOLDED_BYTES = 64 * 1024


class ConstantFolding:
    """Replaces nodes whose inputs are all constant, or that take sizes which are known, by their result, and a weight's
    transposition by a transposed weight."""

    name = "constant-folding"
    needs = "nothing"
    must_match = "never: a graph may have no constants to fold"
    guarantees = "what is left depends on an input, or would be large; no weight was read"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            if any(is_any_of(output, graph.outputs) for output in node.outputs):
                continue  # a graph output needs a node that writes it
            if _transposes_a_weight(node, weights):
                yield Rewrite(node.name, module_of(node.name), partial(_transpose, node, weights))
            elif (sizes := known_sizes(node)) is not None:
                folded = numpy_helper.from_array(sizes, node.outputs[0].name)
                yield Rewrite(node.name, module_of(node.name), partial(_fold, node, folded))
            elif _is_foldable(node, weights) and (value := evaluate(node)) is not None:
                yield Rewrite(node.name, module_of(node.name), partial(_fold, node, value))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str:
        """Why a node stays."""
        if any(is_any_of(output, graph.outputs) for output in node.outputs):
            return "it writes an output of the graph"
        varying = [t.name for t in node.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        if varying:
            return f"its input {varying[0]} is not constant"
        read = [t.name for t in node.inputs if t.name in weights]
        if read:
            return f"its input {read[0]} is a weight, which only a transposition that nothing else shares is moved into"
        return (
            f"{node.op} is not folded: its result would be large, or it is not a pure standard operator of one output"
        )


def _fold(node: gs.Node, folded: onnx.TensorProto) -> str:
    redirect_readers(node.outputs[0], gs.Constant(node.outputs[0].name, LazyValues(folded)))
    node.outputs.clear()
    return f"folded {node.op}"


def _transpose(node: gs.Node, weights: dict[str, Recipe]) -> str:
    redirect_readers(node.outputs[0], _transposed_weight(node, weights))
    node.outputs.clear()
    return "transposed a weight by reference"


def _is_foldable(node: gs.Node, weights: dict[str, Recipe]) -> bool:
    """One standard op with one output over constants that are no weights."""
    return (
        node.domain in ("", None)
        and node.op not in NOT_PURE
        and len(node.outputs) == 1
        and not any(isinstance(value, gs.Graph) for value in node.attrs.values())
        and all(isinstance(tensor, gs.Constant) and tensor.name not in weights for tensor in node.inputs)
    )


def evaluate(node: gs.Node) -> onnx.TensorProto | None:
    """The constant a node yields, by ONNX's reference implementation; None where it is too large or not implemented."""
    if node.op == "Constant" and "value" in node.attrs:
        return _tensor(node.attrs["value"], node.outputs[0].name)
    proto = gs.export_onnx(
        gs.Graph([node], inputs=[], outputs=[gs.Variable(node.outputs[0].name)], opset=OPSET), do_type_check=False
    )
    try:
        (value,) = ReferenceEvaluator(
            helper.make_model(proto.graph, opset_imports=[helper.make_opsetid("", OPSET)])
        ).run(None, {})
    except (NotImplementedError, RuntimeError, TypeError):
        return None
    value = np.asarray(value)
    if value.nbytes > max(LARGEST_FOLDED_BYTES, sum(tensor.values.nbytes for tensor in node.inputs)):
        return None
    return numpy_helper.from_array(value, node.outputs[0].name)


def _tensor(constant: gs.Constant, name: str) -> onnx.TensorProto:
    proto = onnx.TensorProto()
    held = constant._values  # a LazyValues keeps the proto; going through numpy would lose types numpy lacks
    proto.CopyFrom(held.tensor if isinstance(held, LazyValues) else numpy_helper.from_array(constant.values))
    proto.name = name
    return proto


def _transposes_a_weight(node: gs.Node, weights: dict[str, Recipe]) -> bool:
    if node.op != "Transpose" or node.domain not in ("", None):
        return False
    recipe = weights.get(node.inputs[0].name)
    return recipe is not None and recipe.values is None and len(node.inputs[0].outputs) == 1


def _transposed_weight(node: gs.Node, weights: dict[str, Recipe]) -> gs.Constant:
    source = node.inputs[0].name
    recipe = weights.pop(source)
    perm = tuple(node.attrs.get("perm", range(len(recipe.shape))[::-1]))
    name = f"{source}.T"
    weights[name] = recipe.transposed(perm)
    return gs.Constant(name, LazyValues(weight_tensor(name, weights[name])))
