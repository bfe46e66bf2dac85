"""The three projections of an attention block → one product, its weight joined by reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import DOMAIN, module_of, node_name, weight_tensor
from moecompiler.passes.pattern import VIEWS, producer_of
from moecompiler.passes.rewiring import position_of
from moecompiler.pipeline import Missed, Rewrite
from moecompiler.weights import Recipe, joined


@dataclass(frozen=True)
class _Projection:
    """A product with a weight, ``[in, out]`` or transposed, and perhaps a bias; ``last`` is the node that gives the result."""

    product: gs.Node
    last: gs.Node
    weight: gs.Tensor
    transposed: bool = False
    bias: gs.Tensor | None = None


class MergeQKV:
    """Replaces the q, k and v projections that an attention op reads by one ``MatMul``, an ``Add`` if they have biases, and a
    ``Split``.

    Takes projections spelled ``MatMul``, ``MatMul`` and ``Add``, or ``Gemm``, whose weights are moved by reference; no weight is
    read. Should match once for each attention op whose projections have such weights.
    """

    name = "merge-qkv"
    needs = "fuse-attention or fuse-context-attention"
    must_match = "once per attention op whose projections have weights by reference"
    guarantees = "such an op reads one product, its weight joined by reference"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            projections = _projections_of(node)
            if not isinstance(projections, str) and _why_apart(projections, weights) is None:
                yield Rewrite(node.name, module_of(node.name), partial(_merge, graph, projections, weights))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        projections = _projections_of(node)
        return projections if isinstance(projections, str) else _why_apart(projections, weights)

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        """The attention ops whose projections have weights by reference and are three all the same."""
        result = []
        for node in graph.nodes:
            projections = _projections_of(node)
            if isinstance(projections, str) or not all(each.weight.name in weights for each in projections):
                continue
            reason = _why_apart(projections, weights)
            if reason is not None:
                result.append(Missed(module_of(node.name), len(projections), node.name, reason))
        return result


def _projections_of(node: gs.Node) -> list[_Projection] | str:
    """The projections of an attention op, or why there are none to merge."""
    if node.domain != DOMAIN or node.op not in ("Attention", "ContextAttention"):
        return f"{node.op} is no attention op"
    found = [_projection_of(tensor) for tensor in node.inputs[:3]]
    projections = [each for each in found if each is not None]
    return projections if len(projections) == 3 else "its q, k and v are not three products with weights"


def _projection_of(tensor: gs.Tensor) -> _Projection | None:
    last = producer_of(tensor)
    while last is not None and last.op in VIEWS:
        last = producer_of(last.inputs[0])
    if last is None or last.op not in ("MatMul", "Gemm", "Add"):
        return None
    if last.op == "MatMul":
        return _Projection(last, last, last.inputs[1])
    if last.op == "Gemm":
        if (last.attrs.get("alpha", 1.0), last.attrs.get("beta", 1.0), last.attrs.get("transA", 0)) != (1.0, 1.0, 0):
            return None
        bias = last.inputs[2] if len(last.inputs) > 2 and not last.inputs[2].is_empty() else None
        return _Projection(last, last, last.inputs[1], bool(last.attrs.get("transB", 0)), bias)
    for addend, bias in (last.inputs, reversed(last.inputs)):
        product = producer_of(addend)
        if product is not None and product.op == "MatMul" and isinstance(bias, gs.Constant) and len(bias.shape) == 1:
            return _Projection(product, last, product.inputs[1], bias=bias)
    return None


def _why_apart(projections: Sequence[_Projection], weights: dict[str, Recipe]) -> str | None:
    """Why three projections cannot be one, or None."""
    if len({id(each.product) for each in projections}) != 3:
        return "its q, k and v are not of three products"
    x = projections[0].product.inputs[0]
    for each in projections:
        recipe = weights.get(each.weight.name)
        if recipe is None or recipe.values is not None or len(recipe.shape) != 2:
            return f"the weight of {each.product.name} is not a matrix that is taken by reference"
        if len(each.weight.outputs) != 1 or (
            each.last is not each.product and len(each.product.outputs[0].outputs) != 1
        ):
            return f"something else reads the weight of {each.product.name}, or the product"
        if each.product.inputs[0] is not x:
            return f"{each.product.name} reads {each.product.inputs[0].name}, not {x.name} as {projections[0].product.name}"
    if len({weights[each.weight.name].dtype for each in projections}) != 1:
        return "its weights are of several types"
    return None if len({each.bias is None for each in projections}) == 1 else "only some of its projections have biases"


def _merge(graph: gs.Graph, projections: Sequence[_Projection], weights: dict[str, Recipe]) -> str:
    products = [each.product for each in projections]
    recipes = []
    for each in projections:
        recipe = weights.pop(each.weight.name)
        recipes.append(recipe.transposed((1, 0)) if each.transposed else recipe)
    module = module_of(products[0].name).rpartition(".")[0]
    number = products[0].name.rpartition("_")[2]
    weight = _by_reference(f"{module}.qkv_proj.weight.T", joined(recipes, axis=1), weights)
    x, outputs = products[0].inputs[0], [each.last.outputs[0] for each in projections]
    at = min(position_of(product, graph) for product in products)
    for each in projections:
        each.last.outputs.clear()
    shape = [*outputs[0].shape[:-1], weight.shape[1]]
    together = gs.Variable(f"{module}/qkv", outputs[0].dtype, shape)
    made = [gs.Node("MatMul", node_name(module, f"QKV_{number}"), {}, [x, weight], [together])]
    biases = [each.bias for each in projections if each.bias is not None]
    if biases:
        bias, added = _joined_bias(module, number, biases, weights, made), gs.Variable(f"{module}/qkv_biased")
        added.dtype, added.shape = together.dtype, shape
        made.append(gs.Node("Add", node_name(module, f"AddQKV_{number}"), {}, [together, bias], [added]))
        together = added
    sizes = gs.Constant(f"{module}/qkv_sizes", np.array([recipe.shape[1] for recipe in recipes], np.int64))
    split = node_name(module, f"SplitQKV_{number}")
    graph.nodes[at:at] = [*made, gs.Node("Split", split, {"axis": -1}, [together, sizes], outputs)]
    return "merged q, k and v into one product"


def _joined_bias(
    module: str, number: str, biases: Sequence[gs.Tensor], weights: dict[str, Recipe], made: list[gs.Node]
) -> gs.Tensor:
    """The biases as one: by reference, or, where they are small enough to be held in the graph, by a node put to ``made``."""
    if all(bias.name in weights and len(bias.outputs) == 1 for bias in biases):
        recipe = joined([weights.pop(bias.name) for bias in biases], axis=0)
        return _by_reference(f"{module}.qkv_proj.bias", recipe, weights)
    bias = gs.Variable(f"{module}/qkv_bias", biases[0].dtype, [sum(bias.shape[0] for bias in biases)])
    made.append(gs.Node("Concat", node_name(module, f"ConcatQKV_{number}"), {"axis": 0}, list(biases), [bias]))
    return bias


def _by_reference(name: str, recipe: Recipe, weights: dict[str, Recipe]) -> gs.Constant:
    weights[name] = recipe
    return gs.Constant(name, LazyValues(weight_tensor(name, recipe)))
