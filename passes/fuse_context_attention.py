"""Attention without a cache, under an additive mask → ``moecompiler::ContextAttention``."""

from __future__ import annotations

import math
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
    rows,
    writes_cache,
)
from moecompiler.passes.dtypes import written_like
from moecompiler.passes.pattern import VIEWS, Const, Match, OneOf, Op, Pattern, Through, Var, escaping
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.passes.rewiring import position_of
from moecompiler.plugins.attention.op import CONTEXT_ATTENTION
from moecompiler.weights import Recipe

_FACTORS = ("scale", "query_scale", "key_scale")


def _repeated(name: str, inner: Op) -> Pattern:
    """``repeat_kv``: each key-value head as often as there are query heads for it; or the heads as they are."""
    unsqueezed = OneOf((Op("Unsqueeze", (inner,)), Op("Reshape", (inner,))))
    expanded = OneOf(tuple(Op(op, (unsqueezed,), name=f"{name}_expanded") for op in ("Expand", "Tile")))
    return OneOf((Op("Reshape", (expanded,)), inner))


def _by(factor: str, inner: Pattern) -> Pattern:
    """``inner``, or that times a number."""
    number = Const(factor, "one number", lambda value: value.size == 1)
    return OneOf((Op("Mul", (inner, number), commutative=True), inner))


def _swaps_last_two(node: gs.Node) -> str | None:
    perm = list(node.attrs.get("perm", ()))
    rank = len(perm)
    expected = [*range(rank - 2), rank - 1, rank - 2]
    return None if perm == expected else f"it permutes axes {perm}, not {expected}"


# torch decomposes sdpa: both factors of the product carry the scale's root, and keys are transposed with batch and heads as
# one axis.
_KEY_COLUMNS = Through(
    VIEWS,
    Op("Transpose", (Through(VIEWS, _repeated("key", rotated("key"))),), name="key_columns", test=_swaps_last_two),
)
_PRODUCTS = Op("MatMul", (_by("query_scale", rotated("query")), _by("key_scale", _KEY_COLUMNS)), name="products")
_DIVISOR = Const("divisor", "one number", lambda value: value.size == 1 and float(value.item()) != 0)
_SCALED = OneOf((Op("Div", (Through(("Cast",), _PRODUCTS), _DIVISOR)), _by("scale", Through(("Cast",), _PRODUCTS))))
_MASKED = Op("Add", (Through(("Cast",), _SCALED), Var("mask")), commutative=True)
_SHARES = Op("Softmax", (Through(("Cast",), _MASKED),), name="softmax", test=along_axis(-1))
_ZERO = Const("zero", "0", lambda value: value.size == 1 and float(value.item()) == 0)
# sdpa gives 0 to a query from which the mask hides everything, and so does the op.
_GUARDED = OneOf((Op("Where", (Op("IsNaN", (_SHARES,)), _ZERO, _SHARES)), _SHARES))
_VALUES = _repeated("value", heads("value"))
_MIXED = Op("MatMul", (Through(("Cast",), _GUARDED), Through(("Cast",), _VALUES)))


class FuseContextAttention(PatternPass):
    """Fuses attention over the given tokens alone, as Hugging Face's decoder models export it, into one op."""

    name = "fuse-context-attention"
    needs = "constant-folding and clean-up"
    must_match = "once per self_attn that keeps no cache"
    guarantees = "rotary embedding and attention of a layer are one op"
    modules = r"(.+\.)?self_attn"
    op_names = ("ContextAttention", "Attention")
    pattern = Op("Reshape", (Op("Transpose", (_MIXED,), test=permutes(0, 2, 1, 3)),), name="output")
    ops: ClassVar[tuple[OpSpec, ...]] = (CONTEXT_ATTENTION,)

    def expects(self, nodes: Sequence[gs.Node]) -> bool:
        return not writes_cache(nodes)

    def check(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str | None:
        return (
            _repetition_differs(found, "key")
            or _repetition_differs(found, "value")
            or _columns_differ(found)
            or _mask_differs(found)
            or halves_differ(found, "query")
            or halves_differ(found, "key")
            or escaping(found, graph, kept=(found.named["output"].outputs[0],))
        )

    def replace(self, found: Match, graph: gs.Graph, weights: dict[str, Recipe]) -> str:
        last = found.named["output"]
        (output,) = last.outputs
        last.outputs.clear()
        scale = math.prod(found.scalar(factor) for factor in _FACTORS if factor in found.tensors)
        attributes = {
            "num_heads": int(heads_shape(found, "query")[1]),
            "num_kv_heads": int(heads_shape(found, "key")[1]),
            "scale": scale / (found.scalar("divisor") if "divisor" in found.tensors else 1.0),
        }
        name = node_name(module_of(last.name), f"ContextAttention_{last.name.rpartition('_')[2]}")
        projections = [rows(found, projection, graph) for projection in ("query", "key", "value")]
        inputs = [
            *projections,
            found.tensors["cos"],
            found.tensors["sin"],
            _four_axes(found.tensors["mask"], name, graph),
        ]
        # in float16, torch's tracing exporter goes on in float32 behind sdpa
        written = written_like(output, projections[0], graph, name)
        graph.nodes.insert(position_of(last, graph), CONTEXT_ATTENTION.node(name, inputs, [written], attributes))
        return f"fused {len(found.nodes)} nodes into ContextAttention"


def _repetition_differs(found: Match, name: str) -> str | None:
    expanded = found.named.get(f"{name}_expanded")
    if expanded is None:
        return None
    if expanded.inputs[0].shape[2:3] != [1]:
        return f"{expanded.name} repeats along another axis than the one after the heads"
    query_heads, kv_heads = heads_shape(found, "query")[1], heads_shape(found, "key")[1]
    repeated = list(expanded.outputs[0].shape[1:3])
    if not isinstance(query_heads, int) or repeated != [kv_heads, query_heads // int(kv_heads)]:
        return f"{expanded.name} gives {repeated} of {kv_heads} heads, for {query_heads} heads of the query"
    return None


def _columns_differ(found: Match) -> str | None:
    """Why the keys' columns are not ``[B, heads, D, S]`` of the keys' rows, or None."""
    columns = found.named["products"].inputs[1].shape
    batch, _, length, size = heads_shape(found, "key")
    count = heads_shape(found, "query")[1]
    if columns is None or list(columns) != [batch, count, size, length]:
        return f"{found.named['key_columns'].name} gives keys of shape {columns}, not {[batch, count, size, length]}"
    return None


def _mask_differs(found: Match) -> str | None:
    shape = found.tensors["mask"].shape
    if shape is None or len(shape) not in (2, 4) or (len(shape) == 4 and shape[1] != 1):
        return f"the mask {found.tensors['mask'].name} of shape {shape} is not one for all heads"
    for name in ("cos", "sin"):
        if len(found.tensors[name].shape or ()) != 4:
            return f"the {name} {found.tensors[name].name} has not four axes"
    return None


def _four_axes(mask: gs.Tensor, name: str, graph: gs.Graph) -> gs.Tensor:
    """The mask as ``[B, 1, S, S]``; one without batch and heads is given those axes."""
    if len(mask.shape) == 4:
        return mask
    unsqueezed = gs.Variable(f"{name}_mask", mask.dtype, [1, 1, *mask.shape])
    axes = gs.Constant(f"{name}_mask_axes", np.array([0, 1], np.int64))
    node = node_name(module_of(name), f"Unsqueeze_mask_{name.rpartition('_')[2]}")
    graph.nodes.append(gs.Node("Unsqueeze", node, {}, [mask, axes], [unsqueezed]))
    return unsqueezed
