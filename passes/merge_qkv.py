"""The three projections of an attention block → one product, its weight joined by reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import DOMAIN, module_of, node_name, weight_tensor
from moecompiler.passes.pattern import producer_of
from moecompiler.pipeline import Rewrite
from moecompiler.weights import Recipe, joined


class MergeQKV:
    """Replaces the q, k and v projections that an attention op reads by one ``MatMul`` and a ``Split``.

    Takes projections without bias whose weights are moved by reference, ``[in, out]``; no weight is read.
    """

    name = "merge-qkv"

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            if self.why_not(graph, weights, node) is None:
                yield Rewrite(node.name, module_of(node.name), partial(_merge, graph, node, weights))

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        if node.domain != DOMAIN or node.op not in ("Attention", "ContextAttention"):
            return f"{node.op} is no attention op"
        if _are_projections([producer_of(tensor) for tensor in node.inputs[:3]], weights):
            return None
        return "its q, k and v are not three products of one activation with weights of their own, taken by reference"


def _are_projections(products: list[gs.Node | None], weights: dict[str, Recipe]) -> bool:
    """Three distinct products of one activation with weights that nothing else reads."""
    found = [product for product in products if product is not None and product.op == "MatMul"]
    if len(found) != 3 or len({id(product) for product in found}) != 3:
        return False
    same_input = all(product.inputs[0] is found[0].inputs[0] for product in found)
    recipes = [weights.get(product.inputs[1].name) for product in found]
    return same_input and all(
        recipe is not None and recipe.values is None and len(recipe.shape) == 2 and len(product.inputs[1].outputs) == 1
        for recipe, product in zip(recipes, found, strict=True)
    )


def _merge(graph: gs.Graph, attention: gs.Node, weights: dict[str, Recipe]) -> str:
    products = [tensor.inputs[0] for tensor in attention.inputs[:3]]
    recipes = [weights.pop(product.inputs[1].name) for product in products]
    module = module_of(products[0].name).rpartition(".")[0]
    number = products[0].name.rpartition("_")[2]
    weight = f"{module}.qkv_proj.weight.T"
    weights[weight] = joined(recipes, axis=1)
    x, outputs = products[0].inputs[0], [product.outputs[0] for product in products]
    at = min(graph.nodes.index(product) for product in products)
    for product in products:
        product.outputs.clear()
    together = gs.Variable(f"{module}/qkv", outputs[0].dtype, [*outputs[0].shape[:-1], weights[weight].shape[1]])
    sizes = gs.Constant(f"{module}/qkv_sizes", np.array([recipe.shape[1] for recipe in recipes], np.int64))
    constant = gs.Constant(weight, LazyValues(weight_tensor(weight, weights[weight])))
    graph.nodes[at:at] = [
        gs.Node("MatMul", node_name(module, f"QKV_{number}"), {}, [x, constant], [together]),
        gs.Node("Split", node_name(module, f"SplitQKV_{number}"), {"axis": -1}, [together, sizes], outputs),
    ]
    return "merged q, k and v into one product"
