"""Attention without a cache, under an additive mask → ``moecompiler::ContextAttention``."""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name
from moecompiler.ops import OpSpec
from moecompiler.passes.attention_patterns import along_axis, halves_differ, heads, heads_shape, permutes, rotated
from moecompiler.passes.pattern import Const, Match, OneOf, Op, Pattern, Through, Var, escaping
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.plugins.attention.op import CONTEXT_ATTENTION
from moecompiler.weights import Recipe


def _repeated(name: str, inner: Op) -> Pattern:
    """``repeat_kv``: each key-value head as often as there are query heads for it; or the heads as they are."""
    expanded = Op("Expand", (Op("Unsqueeze", (inner,), name=f"{name}_unsqueezed"),), name=f"{name}_expanded")
    return OneOf((Op("Reshape", (expanded,)), inner))


_KEY_COLUMNS = Op("Transpose", (_repeated("key", rotated("key")),), test=permutes(0, 1, 3, 2))
_PRODUCTS = Op("MatMul", (rotated("query"), _KEY_COLUMNS))
_SCALED = Op(
    "Mul",
    (Through(("Cast",), _PRODUCTS), Const("scale", "one number", lambda value: value.size == 1)),
    commutative=True,
)
_SHARES = Through(
    ("Cast",),
    Op("Softmax", (Through(("Cast",), Op("Add", (_SCALED, Var("mask")), commutative=True)),), test=along_axis(-1)),
)
_MIXED = Op("MatMul", (_SHARES, _repeated("value", heads("value"))))


class FuseContextAttention(PatternPass):
    """Fuses attention over the given tokens alone, as Hugging Face's decoder models export it, into one op."""

    name = "fuse-context-attention"
    modules = r"(.+\.)?self_attn"
    op_names = ("ContextAttention",)
    pattern = Op("Reshape", (Op("Transpose", (_MIXED,), test=permutes(0, 2, 1, 3)),), name="output")
    ops: ClassVar[tuple[OpSpec, ...]] = (CONTEXT_ATTENTION,)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        for name in ("key", "value"):
            expanded = found.named.get(f"{name}_expanded")
            if expanded is not None and expanded.inputs[0].shape[2:3] != [1]:
                return f"{expanded.name} repeats along another axis than the one after the heads"
        if len(found.tensors["mask"].shape or ()) != 4:
            return f"the mask {found.tensors['mask'].name} has not four axes"
        return (
            halves_differ(found, "query")
            or halves_differ(found, "key")
            or escaping(found, graph, kept=(found.named["output"].outputs[0],))
        )

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        last = found.named["output"]
        (output,) = last.outputs
        last.outputs.clear()
        attributes = {
            "num_heads": int(heads_shape(found, "query")[1]),
            "num_kv_heads": int(heads_shape(found, "key")[1]),
            "scale": found.scalar("scale"),
        }
        inputs = [found.tensors[name] for name in ("query", "key", "value", "cos", "sin", "mask")]
        name = node_name(module_of(last.name), f"ContextAttention_{last.name.rpartition('_')[2]}")
        graph.nodes.insert(graph.nodes.index(last), CONTEXT_ATTENTION.node(name, inputs, [output], attributes))
        return f"fused {len(found.nodes)} nodes into ContextAttention"
