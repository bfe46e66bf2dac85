"""Rotary embedding, KV cache update and causal grouped-query attention → ``moecompiler::Attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.attention_patterns import (
    along_axis,
    halves_differ,
    heads,
    heads_shape,
    permutes,
    rotated,
    writes_cache,
)
from moecompiler.passes.pattern import (
    Const,
    Match,
    Miss,
    OneOf,
    Op,
    Through,
    Var,
    escaping,
    match_tensor,
    small_constant,
)
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.passes.rewiring import position_of
from moecompiler.plugins.attention.op import ATTENTION
from moecompiler.weights import Recipe


def _updated(past: str, new: Op) -> Op:
    return Op("ScatterElements", (Var(past), Var("slots"), new), name=f"present_{past}", test=along_axis(2))


_KEYS = _updated("past_key", rotated("key"))
_VALUES = _updated("past_value", heads("value"))
_PRODUCTS = Op("MatMul", (Op("Reshape", (rotated("query"),)), Op("Transpose", (_KEYS,), test=permutes(0, 1, 3, 2))))
_SCALED = Op(
    "Mul",
    (Through(("Cast",), _PRODUCTS), Const("scale", "one number", lambda value: value.size == 1)),
    commutative=True,
)
_SCORES = Op("Reshape", (_SCALED,))
_LOWEST = Const("lowest", "a number that softmax makes 0", lambda value: value.size == 1 and float(value) < -1e4)
# The mask is matched by itself: layers may share it, so it is not what is fused.
_MASKED = OneOf(
    (
        Op("Where", (Var("mask"), _LOWEST, _SCORES), name="hides"),
        Op("Where", (Var("mask"), _SCORES, _LOWEST), name="shows"),
    )
)
_SHARES = Through(("Cast",), Op("Softmax", (_MASKED,), test=along_axis(-1)))
_MIXED = Op("MatMul", (Op("Reshape", (_SHARES,)), _VALUES))

# What a query sees: slots up to its own, and with a window only the last of them.
_QUERY_SLOT = Through(("Unsqueeze",), Var("position_ids"))
_PAST = OneOf(
    (
        Op("LessOrEqual", (Var("slot"), _QUERY_SLOT)),
        Op("GreaterOrEqual", (_QUERY_SLOT, Var("slot"))),
    )
)
_RECENT = Op("Greater", (Var("slot"), Op("Sub", (_QUERY_SLOT, Const("window", "one number")))))
_VISIBLE = OneOf((_PAST, Op("And", (_PAST, _RECENT), commutative=True)))
_SLOTS = Op("Expand", (Through(("Unsqueeze",), Var("position_ids")),))


class FuseAttention(PatternPass):
    """Fuses what lies between a layer's q/k/v projections and its output projection into one op, cache update included."""

    name = "fuse-attention"
    needs = "constant-folding and clean-up"
    must_match = "once per self_attn that keeps a cache"
    guarantees = "rotary embedding, cache update and attention of a layer are one op"
    modules = r"(.+\.)?self_attn"
    op_names = ("Attention", "ContextAttention")
    pattern = Op("Reshape", (Op("Transpose", (Op("Reshape", (_MIXED,)),), test=permutes(0, 2, 1, 3)),), name="output")
    ops: ClassVar[tuple[OpSpec, ...]] = (ATTENTION,)

    def expects(self, nodes: Sequence[gs.Node]) -> bool:
        return writes_cache(nodes)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        kept = (
            found.named["output"].outputs[0],
            found.named["present_past_key"].outputs[0],
            found.named["present_past_value"].outputs[0],
        )
        return (
            halves_differ(found, "query")
            or halves_differ(found, "key")
            or _mask_differs(found)
            or escaping(found, graph, kept)
        )

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        last = found.named["output"]
        writers = (last, found.named["present_past_key"], found.named["present_past_value"])
        outputs = [writer.outputs[0] for writer in writers]
        for writer in writers:
            writer.outputs.clear()
        mask = _mask(found, Miss())
        assert mask is not None
        attributes = {
            "num_heads": int(heads_shape(found, "query")[1]),
            "num_kv_heads": int(heads_shape(found, "key")[1]),
            "scale": found.scalar("scale"),
            "window": int(mask.scalar("window")) if "window" in mask.tensors else 0,
        }
        names = ("query", "key", "value", "cos", "sin")
        inputs = [found.tensors[name] for name in names]
        inputs += [mask.tensors["position_ids"], found.tensors["past_key"], found.tensors["past_value"]]
        name = node_name(module_of(last.name), f"Attention_{last.name.rpartition('_')[2]}")
        graph.nodes.insert(position_of(last, graph), ATTENTION.node(name, inputs, outputs, attributes))
        return f"fused {len(found.nodes)} nodes into Attention"


def _mask(found: Match, miss: Miss) -> Match | None:
    """The mask's own match, with ``position_ids``, ``slot`` and perhaps ``window``."""
    pattern = Op("Not", (_VISIBLE,)) if "hides" in found.named else _VISIBLE
    return match_tensor(pattern, found.tensors["mask"], miss)


def _mask_differs(found: Match) -> str | None:
    miss = Miss()
    mask = _mask(found, miss)
    if mask is None:
        return f"the mask is not a causal one: {miss.reason}"
    slots = match_tensor(_SLOTS, found.tensors["slots"], miss)
    if slots is None:
        return f"the cache is not written at given positions: {miss.reason}"
    if slots.tensors["position_ids"] is not mask.tensors["position_ids"]:
        return "the cache is written at other positions than the mask is made from"
    if len(slots.tensors["position_ids"].shape or ()) != 2:
        return f"the positions {slots.tensors['position_ids'].name} are not [batch, sequence]"
    capacity = found.tensors["past_key"].shape[2]
    slot = small_constant(mask.tensors["slot"])
    if slot is None or not np.array_equal(slot.reshape(-1), np.arange(capacity)):
        return f"the mask does not number the cache's {capacity} slots"
    return None
