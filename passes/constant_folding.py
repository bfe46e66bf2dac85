"""Constant folding: what can be computed now is; weights are moved by reference, never read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import OPSET, module_of, weight_tensor
from moecompiler.passes.rewiring import NOT_PURE, redirect_readers
from moecompiler.pipeline import Change
from moecompiler.weights import Recipe

# A constant that is larger than what it is made of only costs memory and time to load (an expanded mask, say).
LARGEST_FOLDED_BYTES = 64 * 1024


class ConstantFolding:
    """Replaces nodes whose inputs are all constant by their result, and a weight's transposition by a transposed weight."""

    name = "constant-folding"

    def rewrite(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Change]:
        changes = []
        for node in list(graph.nodes):
            if any(output in graph.outputs for output in node.outputs):
                continue  # a graph output needs a node that writes it
            if _transposes_a_weight(node, weights):
                constant = _transposed_weight(node, weights)
                what = "transposed a weight by reference"
            elif _is_foldable(node, weights):
                folded = evaluate(node)
                if folded is None:
                    continue
                constant = gs.Constant(node.outputs[0].name, LazyValues(folded))
                what = f"folded {node.op}"
            else:
                continue
            redirect_readers(node.outputs[0], constant)
            node.outputs.clear()
            changes.append(Change(what, node.name, module_of(node.name)))
        return changes


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
