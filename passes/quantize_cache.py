"""A KV cache of the model's type → one of int8 or E4M3 codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moecompiler.graph import DOMAIN, module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.dtypes import onnx_dtype
from moecompiler.passes.rewiring import position_of
from moecompiler.pipeline import Missed, Rewrite
from moecompiler.plugins.attention.cache_op import CACHE_SPECS, cache_spec, update_spec
from moecompiler.quantization.cache import CacheQuantization
from moecompiler.weights import Recipe

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


class QuantizeCache:
    """Holds keys and values as codes: the graph's caches become bytes, and ``Attention`` becomes ``AttentionFp8Cache`` or the
    like, with the layer's scales. In a graph without that op, before what reads a cache stands ``UpdateFp8Cache``, which writes
    it and gives the numbers that are in it.
    """

    name = "quantize-cache"
    needs = "a cache of floats as `export` makes it; fused attention, where its arithmetic is to be FP8 too"
    must_match = "once per attention, or per cache"
    guarantees = "each cache holds codes"

    def __init__(self, cache: CacheQuantization | None = None):
        self.cache = cache

    @property
    def parameters(self) -> object:
        """What its rewrites depend on besides the graph, as JSON."""
        return None if self.cache is None else self.cache.to_json()

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        """The op of a node that this pass makes; None for others."""
        return next((spec for spec in CACHE_SPECS if spec.name == node.op), None)

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for node in list(graph.nodes):
            if self.why_not(graph, weights, node) is None:
                yield Rewrite(node.name, module_of(node.name), partial(self._replace, graph, node))
        left = {node.op for node in graph.nodes if node.domain == DOMAIN}
        graph.functions = [each for each in graph.functions if each.domain != DOMAIN or each.name in left]

    def why_not(self, graph: gs.Graph, weights: dict[str, Recipe], node: gs.Node) -> str | None:
        """Why a node stays; None where it does not."""
        if self.cache is None:
            return "no cache is to be quantized"
        if node.domain == DOMAIN and node.op == "Attention":
            past, present = node.inputs[6:8], node.outputs[1:3]
        elif not node.domain and node.op == "ScatterElements" and node.attrs.get("axis") == 2:
            past, present = node.inputs[:1], node.outputs[:1]
            if self.cache.fp8_context:
                return "FP8 attention in prefill is for attention that is fused"
        else:
            return f"{node.op} writes no cache"
        inputs, outputs = {each.name for each in graph.inputs}, {each.name for each in graph.outputs}
        for tensor in past:
            named = _PAST.fullmatch(tensor.name)
            if tensor.name not in inputs or named is None:
                return f"{tensor.name} is no cache that the graph is given"
            if len(tensor.outputs) > 1:
                return f"{tensor.name} is read by other nodes too"
            if int(named[1]) >= len(self.cache.scales):
                return f"there are no scales for {tensor.name}"
        return next((f"{each.name} is no output of the graph" for each in present if each.name not in outputs), None)

    def missed(self, graph: gs.Graph, weights: dict[str, Recipe]) -> list[Missed]:
        """The caches that are left as they are."""
        found = []
        for tensor in graph.inputs if self.cache is not None else ():
            if _PAST.fullmatch(tensor.name) and tensor.dtype != np.int8:
                reader = tensor.outputs[0] if tensor.outputs else None
                reason = self.why_not(graph, weights, reader) if reader is not None else None
                module = module_of(reader.name) if reader is not None else ""
                found.append(Missed(module, 0, tensor.name, reason or "nothing reads it"))
        return found

    def _replace(self, graph: gs.Graph, node: gs.Node) -> str:
        assert self.cache is not None
        inputs, outputs = list(node.inputs), list(node.outputs)
        past = inputs[6:8] if node.op == "Attention" else inputs[:1]
        floats = onnx_dtype(past[0])
        assert floats is not None
        scales = [self._scale(tensor.name, floats) for tensor in past]
        node.outputs.clear()
        if node.op == "Attention":
            spec = cache_spec(self.cache.format, self.cache.fp8_context)
            present = outputs[1:3]
            attributes = dict(node.attrs)
            inputs += scales
        else:
            spec, attributes, present = update_spec(self.cache.format), {}, outputs[:1]
            read = gs.Variable(f"{node.name}/read", past[0].dtype, past[0].shape)
            for reader in list(outputs[0].outputs):
                reader.inputs = [read if each is outputs[0] else each for each in reader.inputs]
            inputs, outputs = [*inputs, *scales], [outputs[0], read]
        for tensor in (*past, *present):
            tensor.dtype = np.dtype(np.int8)
        name = node_name(module_of(node.name), f"{spec.name}_{node.name.rpartition('_')[2]}")
        graph.nodes[position_of(node, graph)] = spec.node(name, inputs, outputs, attributes)
        return f"{', '.join(tensor.name for tensor in past)}: {self.cache.format.value}"

    def _scale(self, past: str, floats: int) -> gs.Constant:
        """``[1]``, of the op's floating-point type."""
        named = _PAST.fullmatch(past)
        assert named is not None
        assert self.cache is not None
        scale = self.cache.scales[int(named[1])][named[2] == "value"]
        tensor = onnx.helper.make_tensor(f"{past}.scale", floats, [1], [scale])
        return gs.Constant(tensor.name, LazyValues(tensor))  # numpy has no bfloat16
