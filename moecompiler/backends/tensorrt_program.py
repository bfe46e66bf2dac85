"""What a program becomes before TensorRT's parser reads it: which nodes are plugins, and which weights are bound at run time.

Pure: graph in, graph out, without TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from moecompiler.backends.base import BuildSettings, PluginLibrary
from moecompiler.backends.fused_collectives import inline_fused_collectives
from moecompiler.backends.tensorrt_barrier import add_barriers, moe_without_plugin
from moecompiler.backends.tensorrt_bytes import unsigned_caches
from moecompiler.backends.tensorrt_fp8 import widen_fp8_experts
from moecompiler.backends.tensorrt_fp8_rounding import round_by_arithmetic
from moecompiler.backends.tensorrt_int4 import widen_int4
from moecompiler.backends.tensorrt_slower import slower_notes
from moecompiler.errors import UserError
from moecompiler.graph import COLLECTIVES, DOMAIN, FUSED_COLLECTIVES, Program, point_weights_at
from moecompiler.ops import VERSION, plugin_name
from moecompiler.plugin_switches import Mode, PluginSwitches
from moecompiler.weights import NUMPY_DTYPES, Recipe, Shape

AS_BYTES = (TensorProto.INT4, TensorProto.FLOAT8E4M3FN)  # TensorRT 10.6 has no INT4 inputs, of plugins or of engines
BUILDER_SHARE = 4.25  # bytes that a builder takes for each of the weights that it bakes: see docs/tensorrt-rtx.md
LARGE = 1 << 30  # bytes of expert weights from which on they stay out of the plan, unless told otherwise


@dataclass(frozen=True)
class Prepared:
    """``program``: what the parser reads, its weights those that are baked in; ``bound``: weights that are engine inputs of the
    same name. ``plugins``: names of the nodes that are plugins, with their ops. ``aliases``: tensors that are written in place
    of an input: output → input. ``notes``: what was asked for and is not so. ``as_bytes``: codes that plugins get as int8, as
    they are stored."""

    program: Program
    bound: Mapping[str, Recipe]
    plugins: Mapping[str, str]
    aliases: Mapping[str, str]
    notes: tuple[str, ...] = ()
    as_bytes: frozenset[str] = frozenset()


Tidy = Callable[[Program], Program]


def prepare(
    program: Program,
    settings: BuildSettings,
    dtype: str,
    sm: int,
    library: PluginLibrary,
    tidy: Tidy = lambda program: program,
) -> Prepared:
    """For a GPU of compute capability ``sm``. ``tidy`` is run where bodies have been inlined: 10.6's builder fails at what it
    finds twice among them ("ssa_validation").

    Raises: UserError where a plugin is insisted on and there is none that fits, or an op has neither plugin nor body."""
    model = without_refused_exchanges(program.model, settings.plugins, dtype, sm, library)
    chosen, notes = choose_plugins(model, settings.plugins, dtype, sm, library)
    aliases = find_aliases(model, chosen, library)
    apart = moe_without_plugin(model, chosen)
    program = Program(mark_plugins(model, chosen), program.weights)
    unsigned_caches(program.model)
    if any(node.domain == DOMAIN and node.name not in chosen for node in model.graph.node):
        program = tidy(program)
    program, int4_notes = widen_int4(program)
    program, fp8_notes = widen_fp8_experts(program)
    model = program.model
    round_by_arithmetic(model)
    add_barriers(model, apart)
    bound, baked_notes = choose_bound(model, settings, program.weights)
    baked = inline_literals(model, {name: each for name, each in program.weights.items() if name not in bound})
    as_bytes = codes_of_plugins(model, chosen)
    hold_as_bytes(model, as_bytes)
    make_inputs(model, bound)
    slower = slower_notes(chosen.values(), settings.limits, sm)
    notes += [*baked_notes, *int4_notes, *fp8_notes, *slower]
    return Prepared(Program(model, baked), bound, chosen, aliases, tuple(notes), as_bytes)


def without_refused_exchanges(
    model: onnx.ModelProto, switches: PluginSwitches, dtype: str, sm: int, library: PluginLibrary
) -> onnx.ModelProto:
    """A copy in which ops that ranks exchange something in are plugins-to-be, or bodies: in those are collectives, which have to
    be plugins themselves."""
    shapes = known_shapes(model) if any(node.op_type in FUSED_COLLECTIVES for node in model.graph.node) else {}

    def stays(node: onnx.NodeProto) -> bool:
        mode = switches.mode(node.op_type, node.name)
        if mode is not Mode.AUTO:
            return mode is Mode.ON  # ``choose_plugins`` says what is wrong with it
        known = all(name in shapes for name in node.input)
        return known and library.refusal(node, tuple(shapes[name] for name in node.input), dtype, sm) is None

    return inline_fused_collectives(model, stays)


def choose_plugins(
    model: onnx.ModelProto, switches: PluginSwitches, dtype: str, sm: int, library: PluginLibrary
) -> tuple[dict[str, str], list[str]]:
    """Names and ops of the nodes that are to be plugins, and notes.

    Raises: UserError where that cannot be.
    """
    bodies = {function.name for function in model.functions if function.domain == DOMAIN}
    ours = [node for node in model.graph.node if node.domain == DOMAIN]
    shapes = known_shapes(model) if ours else {}
    chosen: dict[str, str] = {}
    notes: dict[str, None] = {}
    for node in ours:
        mode = switches.mode(node.op_type, node.name)
        if mode is Mode.OFF and node.op_type in bodies:
            continue
        unknown = [name for name in node.input if name not in shapes]
        if unknown:
            refusal: str | None = f"the shape of its input {unknown[0]} is not known"
        else:
            refusal = library.refusal(node, tuple(shapes[name] for name in node.input), dtype, sm)
        if refusal is None:
            chosen[node.name] = node.op_type
        elif node.op_type not in bodies:
            raise UserError(f"{node.name}: backend tensorrt cannot run {node.op_type}: {refusal}")
        elif mode is Mode.ON:
            raise UserError(f"--plugins {switches}: {node.name} ({node.op_type}) cannot be a plugin: {refusal}")
        else:
            notes[f"{node.op_type} runs as its plain operators: {refusal}"] = None
    for rule in switches.unused((node.op_type, node.name) for node in ours):
        notes[f"--plugins {rule} fits no node of the graph"] = None
    if all(node.op_type in COLLECTIVES for node in ours):
        if switches.insists:
            raise UserError(f"--plugins {switches}: the graph has no fused ops; compile with --pipeline plugins")
        if switches.mode("", "") is not Mode.OFF:
            notes["the graph has no fused ops, so nothing runs as a plugin; --pipeline plugins makes them"] = None
    return chosen, list(notes)


def known_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of the graph's tensors, -1 for what is not known before it runs; tensors of unknown rank are not there."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    return shapes


def mark_plugins(model: onnx.ModelProto, chosen: Mapping[str, str]) -> onnx.ModelProto:
    """Chosen nodes get their plugin's name, under which there is no function; of the others the bodies are inlined.

    TensorRT's parser would inline them too, but not reliably: it goes by an op's name without its domain, and takes ours for
    ONNX's own ``Attention`` where it knows that (10.15 and later); and it takes a body's value for the graph's of the same name
    (10.6).
    """
    for node in model.graph.node:
        if node.name in chosen:
            node.op_type = plugin_name(node.op_type)
            node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
            node.attribute.append(helper.make_attribute("plugin_version", str(VERSION)))
    inlined = onnx.inliner.inline_local_functions(model)
    bodies = {(function.domain, function.name): function for function in model.functions}
    rest = iter(inlined.graph.node)
    for node in model.graph.node:
        body = bodies.get((node.domain, node.op_type))
        for index, inner in enumerate(islice(rest, len(body.node) if body else 1)):
            if body:  # the inliner leaves them without a name
                inner.name = f"{node.name}.{inner.op_type}_{index}"
    return inlined


def find_aliases(model: onnx.ModelProto, chosen: Mapping[str, str], library: PluginLibrary) -> dict[str, str]:
    """Which outputs of the graph a plugin writes in place of an input of the graph."""
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    aliases = {}
    for node in model.graph.node:
        for output, source in library.aliases(chosen[node.name]).items() if node.name in chosen else ():
            if node.output[output] in outputs and node.input[source] in inputs:
                aliases[node.output[output]] = node.input[source]
    return aliases


def inline_literals(model: onnx.ModelProto, weights: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Puts what is not the checkpoint's (ids, offsets) into the graph; the recipes of the others."""
    for index, tensor in enumerate(model.graph.initializer):
        recipe = weights.get(tensor.name)
        if recipe is not None and recipe.values is not None:
            array = np.array(recipe.values, NUMPY_DTYPES[recipe.dtype]).reshape(recipe.shape)
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(array, tensor.name))
    return {name: recipe for name, recipe in weights.items() if recipe.values is None}


def is_expert(name: str, recipe: Recipe) -> bool:
    """Whether a weight holds experts: ``[experts, rows, columns]``, or codes, scales or zero points of such."""
    return ".experts." in name and (len(recipe.shape) == 3 or recipe.quantized is not None)


def baked_bytes(weights: Mapping[str, Recipe], settings: BuildSettings) -> int:
    """About how much of a rank's weights a plan holds; what ``choose_bound`` finds has to be a constant is left out."""
    if settings.moe_weights == "all":
        return 0
    sizes = {name: recipe.nbytes for name, recipe in weights.items()}
    experts = sum(sizes[name] for name, recipe in weights.items() if is_expert(name, recipe))
    auto = settings.moe_weights == "auto" and experts >= LARGE
    return sum(sizes.values()) - (experts if auto or settings.moe_weights == "external" else 0)


def choose_bound(
    model: onnx.ModelProto, settings: BuildSettings, weights: Mapping[str, Recipe]
) -> tuple[dict[str, Recipe], list[str]]:
    """The weights that are bound at run time, and notes; ``model`` without functions.

    What a ``DequantizeLinear`` reads must be a constant (TensorRT 10.6 builds no other), and with codes go their scales. With
    ``all`` what is given outright is bound too: which experts and which rows of the vocabulary are a rank's.
    """
    if settings.moe_weights == "all":
        return _all_but_constants(model, weights)
    experts = {name: recipe for name, recipe in weights.items() if is_expert(name, recipe)}
    external = settings.moe_weights == "external"
    if not external and (settings.moe_weights != "auto" or sum(each.nbytes for each in experts.values()) < LARGE):
        return {}, []
    read = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.input}
    constant = {name.rpartition(".")[0] for name in experts if name in read}
    bound = {name: recipe for name, recipe in experts.items() if name.rpartition(".")[0] not in constant}
    told = "--moe_weights external: quantized experts are baked into the engine, for they are read by no plugin"
    return bound, [told] if external and len(bound) < len(experts) else []


def _all_but_constants(model: onnx.ModelProto, weights: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], list[str]]:
    """See ``choose_bound``."""
    quantizers = ("QuantizeLinear", "DequantizeLinear")
    read = {name for node in model.graph.node if node.op_type in quantizers for name in node.input if name in weights}
    with_codes = {name.rpartition(".")[0] for name in read if weights[name].quantized is not None}
    constant = {name for name, each in weights.items() if each.quantized and name.rpartition(".")[0] in with_codes}
    bound = {name: recipe for name, recipe in weights.items() if name not in read | constant}
    told = (
        "--moe_weights all: quantized weights that no plugin reads are baked into the engine, so every rank has its own"
    )
    return bound, [told] if len(bound) < len(weights) else []


def codes_of_plugins(model: onnx.ModelProto, chosen: Mapping[str, str]) -> frozenset[str]:
    """Initializers of types that plugins get as bytes.

    Raises: UserError where an operator reads them too, as numbers.
    """
    codes = {tensor.name for tensor in model.graph.initializer if tensor.data_type in AS_BYTES}
    by_plugins = {name for node in model.graph.node if node.name in chosen for name in node.input} & codes
    for node in model.graph.node:
        if node.name not in chosen and (shared := by_plugins.intersection(node.input)):
            raise UserError(
                f"{node.name} reads {min(shared)}, which a plugin reads too: with --plugins, make both plugins or none"
            )
    return frozenset(by_plugins)


def hold_as_bytes(model: onnx.ModelProto, names: frozenset[str]) -> None:
    """Their initializers become int8, two of int4 in one; the bytes stay what they are."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            if tensor.data_type == TensorProto.INT4:
                tensor.dims[-1] //= 2
            tensor.data_type = TensorProto.INT8


def make_inputs(model: onnx.ModelProto, bound: Mapping[str, Recipe]) -> None:
    """Initializers become inputs of the graph."""
    kept: list[TensorProto] = []
    for tensor in model.graph.initializer:
        if tensor.name in bound:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    initializers = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)


def serialized(prepared: Prepared, weights_file: str) -> bytes:
    """The ONNX file whose baked weights are in ``weights_file`` beside it."""
    model = point_weights_at(prepared.program, weights_file).model
    hold_as_bytes(model, prepared.as_bytes)
    return model.SerializeToString(deterministic=True)
