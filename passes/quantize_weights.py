"""Weights that a recipe names → codes and scales, by reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.config import NormalizationMode
from moecompiler.graph import DOMAIN, module_of, node_name, weight_tensor
from moecompiler.ops import OpSpec
from moecompiler.passes.pattern import producer_of
from moecompiler.passes.rewiring import position_of
from moecompiler.passes.static_scales import input_scales, without_scale
from moecompiler.pipeline import Missed, Rewrite
from moecompiler.plugins.quantized.dequantize import Form, dequantize_spec, form_of, forms
from moecompiler.plugins.quantized.linear import linear_spec
from moecompiler.plugins.quantized.moe import quantized_moe_spec
from moecompiler.plugins.quantized.rounding import round_by_expert_spec
from moecompiler.quantization.as_json import recipe_to_json
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantization.schemes import WeightScheme
from moecompiler.quantized import Mixed, published_name, scheme_for
from moecompiler.weights import Part, Quantized, Recipe

_Made = dict[str, list[gs.Tensor]]  # by the name of a weight: what its codes, scales and zero points are in the graph


@dataclass(frozen=True)
class _Weight:
    """A weight that a node multiplies by: the initializer, and its recipe as ``[..., out, in]``."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class _Found:
    """A node whose ``weights`` are to be quantized."""

    node: gs.Node
    weights: tuple[_Weight, ...]
    scheme: WeightScheme
    form: Form
    plan: QuantizationRecipe


class QuantizeWeights:
    """Quantizes the weights that the recipe names: of ``MoE``, which becomes ``MoEInt8`` or the like, and of products, which
    become ``LinearInt8``; before products with a weight of each expert stands ``DequantizeInt8``.

    Weights stay by reference: codes and scales are made when weights are packed.
    """

    name = "quantize-weights"
    needs = "a recipe; constant-folding; fused MoE, where experts and routing are to be one op"
    must_match = "once per weight that the recipe names"
    guarantees = "each of them is codes and scales, by reference"

    def __init__(self, recipe: QuantizationRecipe | None = None):
        self.recipe = recipe or QuantizationRecipe(())

    @property
    def parameters(self) -> object:
        """What its rewrites depend on besides the graph, as JSON."""
        return recipe_to_json(self.recipe)

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op of a node that this pass makes; None for others."""
        for form in forms():
            if node.op == f"MoE{form.name}":
                return quantized_moe_spec(
                    NormalizationMode(node.attrs["normalization_mode"]), node.attrs["top_k"], form
                )
            for spec in (linear_spec(form), dequantize_spec(form), round_by_expert_spec()):
                if node.op == spec.name:
                    return spec
        return None

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        made: _Made = {}
        for node in list(graph.nodes):
            found = self._found(node, weights)
            if isinstance(found, _Found):
                yield Rewrite(node.name, module_of(node.name), partial(_replace, found, graph, weights, made))
        left = {node.op for node in graph.nodes if node.domain == DOMAIN}
        graph.functions = [each for each in graph.functions if each.domain != DOMAIN or each.name in left]

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        found = self._found(node, weights)
        return found if isinstance(found, str) else None

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        """The nodes that read a weight which the recipe names and which is not quantized."""
        result = []
        for node in graph.nodes:
            asked = [
                t for t in node.inputs if t.name in weights and scheme_for(weights[t.name], self.recipe) is not None
            ]
            if asked:
                reason = self.why_not(graph, weights, node) or "it was not looked at"
                result.append(Missed(module_of(node.name), 0, node.name, reason))
        return result

    def _found(self, node: gs.Node, weights: dict[str, Recipe]) -> _Found | str:
        """What is to be quantized of a node, or why nothing."""
        held = _weights_of(node, weights)
        if isinstance(held, str):
            return held
        schemes = [scheme_for(each.recipe, self.recipe) for each in held]
        for each, scheme in zip(held, schemes, strict=True):
            if isinstance(scheme, Mixed):
                return f"{each.name}: {scheme}"
        scheme = schemes[0]
        if any(other != scheme for other in schemes):
            return f"{held[0].name} and {held[1].name} are weights of one op, and are to be quantized differently"
        if scheme is None or isinstance(scheme, Mixed):
            return f"the recipe keeps {published_name(min(held[0].recipe.sources, default=held[0].name))}"
        form = form_of(scheme)
        if form is None:
            return f"there is no op for weights that are {scheme}"
        for each in held:
            scheme.scale_shape(each.recipe.shape, each.name)
            if form.rounds_inputs and (name := without_scale(each.recipe, self.recipe)) is not None:
                return f"there is no static scale of what {name} is multiplied with"
        return _Found(node, held, scheme, form, self.recipe)


def _weights_of(node: gs.Node, weights: dict[str, Recipe]) -> tuple[_Weight, ...] | str:
    """The weights of an MoE or a product, or why it has none that can be quantized."""
    if node.domain == DOMAIN and node.op == "MoE":
        held = tuple(_Weight(t.name, weights[t.name]) for t in node.inputs[2:4] if t.name in weights)
        return held if len(held) == 2 else "its experts' weights are not taken by reference"
    if node.domain or node.op != "MatMul":
        return f"{node.op} is neither MoE nor a product"
    tensor, transposed = node.inputs[1], True
    producer = producer_of(tensor)
    if producer is not None and producer.op == "Transpose":
        perm = producer.attrs.get("perm", ())
        rank = len(perm)
        if list(perm) == [*range(rank - 2), rank - 1, rank - 2]:
            tensor, transposed = producer.inputs[0], False
    recipe = weights.get(tensor.name)
    if recipe is None or not recipe.is_boxes or len(recipe.shape) not in (2, 3):
        return "it multiplies by no weight that is taken by reference"
    perm = (1, 0) if len(recipe.shape) == 2 else (0, 2, 1)
    return (_Weight(tensor.name, recipe.transposed(perm) if transposed else recipe),)


def _replace(found: _Found, graph: gs.Graph, weights: dict[str, Recipe], made: _Made) -> str:
    node, form = found.node, found.form
    parts = [_parts(each, found, weights, made) for each in found.weights]
    scales = [input_scales(each.name, each.recipe, found.plan, weights) for each in found.weights if form.rounds_inputs]
    attributes = {"block_size": found.scheme.block_size} if form.attributes else {}
    number = node.name.rpartition("_")[2]
    if node.op == "MoE":
        mode, top_k = NormalizationMode(node.attrs["normalization_mode"]), node.attrs["top_k"]
        spec = quantized_moe_spec(mode, top_k, form)
        x, router, *_, expert_ids = node.inputs
        inputs = [x, router, *(tensor for each in parts for tensor in each), *scales, expert_ids]
        _put(spec, number, node, inputs, {**attributes, **node.attrs}, graph)
    elif len(found.weights[0].recipe.shape) == 2:
        _put(linear_spec(form), number, node, [node.inputs[0], *parts[0], *scales], attributes, graph)
    else:
        for each in scales:
            _round_before(node, each, number, graph)
        _dequantize_before(found, parts[0], number, attributes, graph)
    return f"quantized {', '.join(each.name for each in found.weights)}: {found.scheme}"


def _put(
    spec: OpSpec,
    number: str,
    node: gs.Node,
    inputs: Sequence[gs.Tensor],
    attributes: Mapping[str, object],
    graph: gs.Graph,
) -> None:
    """A node of ``spec`` in place of ``node``."""
    outputs = list(node.outputs)
    node.outputs.clear()
    name = node_name(module_of(node.name), f"{spec.name}_{number}")
    graph.nodes[position_of(node, graph)] = spec.node(name, inputs, outputs, attributes)


def _round_before(node: gs.Node, scales: gs.Constant, number: str, graph: gs.Graph) -> None:
    """What the product multiplies, as its codes have it, for each expert by a scale of its own."""
    spec, x = round_by_expert_spec(), node.inputs[0]
    y = gs.Variable(f"{node.name}/rounded_input", x.dtype)
    name = node_name(module_of(node.name), f"{spec.name}_{number}")
    graph.nodes.insert(position_of(node, graph), spec.node(name, [x, scales], [y], {}))
    node.inputs[0] = y


def _dequantize_before(
    found: _Found, parts: list[gs.Tensor], number: str, attributes: Mapping[str, object], graph: gs.Graph
) -> None:
    """The weight ``[experts, in, out]`` from its codes, in front of the product that reads it."""
    node, (weight,), spec = found.node, found.weights, dequantize_spec(found.form)
    experts, out, features = weight.recipe.shape
    module, numbers = module_of(node.name), weight_tensor("", weight.recipe)
    dtype = np.float32 if found.form.two_level else LazyValues(numbers).dtype

    def made(name: str, shape: list[int]) -> gs.Variable:
        return gs.Variable(f"{node.name}/{name}", dtype, shape)

    rows, by_expert = made("rows", [experts * out, features]), made("by_expert", [experts, out, features])
    columns = made("columns", [experts, features, out])
    shape = gs.Constant(f"{node.name}/experts_shape", np.array([experts, out, features], np.int64))
    at = position_of(node, graph)
    graph.nodes[at:at] = [
        spec.node(node_name(module, f"{spec.name}_{number}"), parts, [rows], attributes),
        gs.Node("Reshape", node_name(module, f"ReshapeExperts_{number}"), {}, [rows, shape], [by_expert]),
        gs.Node(
            "Transpose", node_name(module, f"TransposeExperts_{number}"), {"perm": [0, 2, 1]}, [by_expert], [columns]
        ),
    ]
    if LazyValues(numbers).dtype != dtype:  # NVFP4's numbers are float32
        cast = gs.Variable(f"{node.name}/rounded", LazyValues(numbers).dtype, columns.shape)
        name, to = node_name(module, f"CastExperts_{number}"), {"to": int(numbers.data_type)}
        graph.nodes.insert(position_of(node, graph), gs.Node("Cast", name, to, [columns], [cast]))
        columns = cast
    node.inputs[1] = columns


def _parts(weight: _Weight, found: _Found, weights: dict[str, Recipe], made: _Made) -> list[gs.Tensor]:
    """Codes, scales, zero points and positions of a weight: rows of all experts."""
    if weight.name in made:
        return made[weight.name]
    recipe, form, scheme = weight.recipe, found.form, found.scheme
    *lead, features = recipe.shape
    rows = prod(lead)
    scales = (rows, prod(scheme.scale_shape(recipe.shape)) // rows) if form.blocks else (rows,)
    wanted = {Part.CODES: (form.codes_dtype, (rows, features)), Part.SCALES: (recipe.dtype, scales)}
    if form.two_level:
        wanted = {Part.CODES: (form.codes_dtype, (rows, features // 2)), Part.SCALES: ("int8", scales)}
        wanted[Part.GLOBAL_SCALES] = ("float32", (rows,))
    if form.asymmetric:
        wanted[Part.ZERO_POINTS] = ("int8", scales)
    if form.ordered:
        wanted[Part.POSITIONS] = ("int64", (prod(lead[:-1]), features))
    tensors = []
    for part, (dtype, shape) in wanted.items():
        name = f"{weight.name.removesuffix('.T')}.{part}"
        weights[name] = Recipe(dtype, shape, quantized=Quantized(recipe, scheme, part))
        tensors.append(gs.Constant(name, LazyValues(weight_tensor(name, weights[name]))))
    made[weight.name] = tensors
    return tensors
