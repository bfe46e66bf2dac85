"""Rank module → ONNX (opset 21), weights by reference.

The module lives on torch's meta device, so no weight is read or allocated. Tensor-parallel ranks of a stage export to the
same graph; what differs between them are recipes.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir
import torch
from onnx import numpy_helper

from moecompiler.collectives import DOMAIN
from moecompiler.config import ExportOptions, ModelConfig
from moecompiler.graph import IR_VERSION, OPSET, SCOPES, Program, name_in_scopes, output_of, weight_tensor
from moecompiler.mapping import Mapping, rank_shape
from moecompiler.model import RankModule
from moecompiler.sharding import inverse_frequencies, recipe_for
from moecompiler.stamping import stamp_layers

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INVERSE_FREQUENCIES = "model.rotary_emb.inv_freq"


def cache_names(layer: int, prefix: str) -> tuple[str, str]:
    """The graph's names of a layer's KV cache; ``prefix`` is ``past_key_values`` or ``present``."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"


def export_rank(config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions) -> Program:
    """Exports one rank.

    Inputs: ``input_ids [batch, sequence]`` int64 (first stage) or ``hidden_states [batch, sequence, H]``,
    ``position_ids [batch, sequence]`` int64, ``last_token_ids [batch]`` int64 (last stage, without ``all_logits``), and for
    each local layer ``past_key_values.N.{key,value} [batch, kv_heads, max_seq_len, D]``.
    Outputs: ``logits [batch, vocab]`` (``[batch, sequence, vocab]`` with ``all_logits``) or ``next_hidden_states``, and
    ``present.N.{key,value}``.
    """
    model = _export_stage(config, mapping, rank, options)
    return with_recipes(model, config, mapping, rank, options)


def with_recipes(
    model: onnx.ModelProto, config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions
) -> Program:
    """The stage's graph as the program of one of its ranks."""
    names = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return Program(model, {name: recipe_for(name, config, mapping, rank, options.dtype) for name in names})


def _export_stage(config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions) -> onnx.ModelProto:
    dtype = TORCH_DTYPES[options.dtype]
    layers = mapping.layers(rank, config.num_hidden_layers)
    with torch.device("meta"):
        module = RankModule(config, mapping, rank, dtype, options.normalization_mode, layers[:1]).eval()
    arguments, dynamic, inputs, outputs = _signature(config, mapping, rank, options, layers[:1])
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            custom_translation_table=_collective_translations(),
        )
    assert exported is not None
    _name_after_modules(exported.model)
    _name_boundaries(exported.model, f"model.layers.{layers[0]}")
    stage = stamp_layers(_to_proto(exported.model, config, mapping, rank, options), layers)
    # the exporter leaves the inner values of composite ops without a shape, and passes go by shapes
    return onnx.shape_inference.infer_shapes(stage, data_prop=True)


def _signature(
    config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions, layers: range
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[str], list[str]]:
    """Example arguments on the meta device, their dynamic axes, and the names of the graph's inputs and outputs."""
    batch, sequence = 2, 3  # any two distinct sizes above 1: the exporter specializes on 0 and 1
    dtype = TORCH_DTYPES[options.dtype]
    kv_heads = rank_shape(config, mapping).kv_heads
    first, last = mapping.is_first_stage(rank), mapping.is_last_stage(rank)
    picks = last and not options.all_logits

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    def cache() -> torch.Tensor:
        return torch.zeros(batch, kv_heads, options.max_seq_len, config.head_dim, dtype=dtype, device="meta")

    hidden = torch.zeros(batch, sequence, config.hidden_size, dtype=dtype, device="meta")
    tokens = {0: "batch", 1: "sequence"}
    arguments = (
        ids(batch, sequence) if first else hidden,
        ids(batch, sequence),
        ids(batch) if picks else None,
        [(cache(), cache()) for _ in layers],
    )
    dynamic = (tokens, tokens, {0: "batch"} if picks else None, [({0: "batch"}, {0: "batch"})] * len(layers))
    inputs = ["input_ids" if first else "hidden_states", "position_ids", *(["last_token_ids"] if picks else [])]
    outputs = ["logits" if last else "next_hidden_states"]
    for layer in layers:
        inputs += cache_names(layer, "past_key_values")
        outputs += cache_names(layer, "present")
    return arguments, dynamic, inputs, outputs


def _collective_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes our torch ops: as nodes of our domain, which has no schema of ONNX's own to look up."""
    from onnx.defs import OpSchema
    from onnxscript import values

    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

    def translation(name: str) -> Callable[..., Any]:
        schema = OpSchema(
            name,
            DOMAIN,
            1,
            inputs=[OpSchema.FormalParameter("x", "T")],
            outputs=[OpSchema.FormalParameter("y", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[OpSchema.Attribute("group", OpSchema.AttrType.INTS, "")],
        )
        op = values.Op(values.Opset(DOMAIN, 1), name, schema)
        return lambda x, group: op(x, group=group)

    return {
        torch.ops.moecompiler.all_reduce.default: translation("AllReduce"),
        torch.ops.moecompiler.all_gather.default: translation("AllGather"),
    }


def _name_after_modules(model: Any) -> None:
    """Names every node after the HF module it comes from: ``model.layers.0.mlp/Mul_3``."""
    for index, node in enumerate(model.graph):
        node.name = name_in_scopes(node.metadata_props.get(SCOPES, ""), f"{node.op_type}_{index}")


def _name_boundaries(model: Any, module: str) -> None:
    """Names the tensors that leave the embedding, a layer's attention, its MoE and the layer itself after these
    (``model.layers.0.mlp/output``), so that they can be compared with the torch modules' outputs after any number of passes."""
    residual = [node for node in model.graph if node.op_type == "Add" and node.name.rpartition("/")[0] == module]
    attention, moe = residual
    if attention.inputs[0] not in model.graph.inputs:
        attention.inputs[0].name = output_of("model.embed_tokens")
    attention.inputs[1].name = output_of(f"{module}.self_attn")
    moe.inputs[1].name = output_of(f"{module}.mlp")
    if moe.outputs[0] not in model.graph.outputs:
        moe.outputs[0].name = output_of(module)


def _to_proto(model: Any, config: ModelConfig, mapping: Mapping, rank: int, options: ExportOptions) -> onnx.ModelProto:
    """Serializes; parameters and buffers become initializers without data (inverse frequencies, the same for every rank,
    are given outright)."""
    weights = {name: list(value.shape) for name, value in model.graph.initializers.items()}
    for value in model.graph.initializers.values():
        value.const_value = None
    model.graph.initializers.clear()
    proto = _without_metadata(onnx_ir.to_proto(model))
    _name_dimensions(proto)
    for name in sorted(weights):
        if name == INVERSE_FREQUENCIES:
            proto.graph.initializer.append(numpy_helper.from_array(inverse_frequencies(config), name))
        else:
            recipe = recipe_for(name, config, mapping, rank, options.dtype)
            if list(recipe.shape) != weights[name]:
                raise AssertionError(f"{name}: the module has shape {weights[name]}, the sharding table {recipe.shape}")
            proto.graph.initializer.append(weight_tensor(name, recipe))
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "moecompiler", ""
    return proto


def _without_metadata(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The exporter notes its own workings on every node and value, down to source paths."""
    graph = proto.graph
    for item in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del item.metadata_props[:]
    for node in graph.node:
        node.ClearField("doc_string")
    return proto


def _name_dimensions(proto: onnx.ModelProto) -> None:
    """The exporter's symbols (``s44``) become ``batch`` and ``sequence``, in expressions too."""
    graph = proto.graph
    position_ids = next(value for value in graph.input if value.name == "position_ids")
    symbols = [dim.dim_param for dim in position_ids.type.tensor_type.shape.dim]
    names = dict(zip(symbols, ("batch", "sequence"), strict=True))
    pattern = re.compile("|".join(rf"\b{symbol}\b" for symbol in symbols))
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: names[found.group()], dim.dim_param)


class _quiet:
    """The exporter prints what it skips; below an error nobody who compiles a Mixtral can act on it."""

    def __init__(self, logger: str):
        self.logger = logging.getLogger(logger)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
