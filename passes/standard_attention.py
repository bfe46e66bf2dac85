"""Our attention ops → ``RotaryEmbedding``, ``TensorScatter`` and ``Attention`` of ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from moecompiler.passes.pattern import producer_of, small_constant
from moecompiler.passes.standard_nodes import Replacement

_SAME_EVERYWHERE = frozenset({"Cast", "Cos", "Sin", "Identity"})  # what they give depends on the element alone
_VIEWS = frozenset({"Unsqueeze", "Squeeze", "Reshape", "Expand"})
_BOOL, _INT64 = np.dtype(bool), np.dtype(np.int64)


def attention_obstacle(node: gs.Node) -> str | None:
    """Why an ``Attention`` cannot be mapped; None where it can."""
    query, _, _, cos, sin, position_ids, past_key, _ = node.inputs
    slots = (past_key.shape or (None,) * 4)[2]
    if not isinstance(slots, int):
        return f"the number of slots of {past_key.name} is not known"
    if position_ids.shape is None or len(position_ids.shape) != 2:
        return f"{position_ids.name} is not [batch, sequence]"
    return _heads_obstacle(node) or _angles_obstacle(cos, query) or _angles_obstacle(sin, query)


def context_attention_obstacle(node: gs.Node) -> str | None:
    """Why a ``ContextAttention`` cannot be mapped; None where it can."""
    query, _, _, cos, sin, mask = node.inputs
    if mask.dtype != query.dtype:
        return f"the mask {mask.name} is {_said(mask.dtype)}, the query {_said(query.dtype)}"
    return _heads_obstacle(node) or _angles_obstacle(cos, query) or _angles_obstacle(sin, query)


def replace_attention(graph: gs.Graph, node: gs.Node, shared: dict[str, gs.Tensor]) -> str:
    """The cache is written from each sequence's first position on, so its positions must be consecutive."""
    query, key, value, cos, sin, position_ids, past_key, past_value = node.inputs
    output, present_key, present_value = node.outputs
    node.outputs.clear()
    made = Replacement(node, shared)
    angles = _half(made, cos, query), _half(made, sin, query)
    kv_heads = int(node.attrs["num_kv_heads"])
    queries = _rotated(made, "query", query, int(node.attrs["num_heads"]), angles)
    keys = _rotated(made, "key", key, kv_heads, angles)
    values = _split(made, "value", value, kv_heads)
    start = _first_slots(made, position_ids)
    made.add("TensorScatter", [past_key, keys, start], [present_key], {"axis": 2})
    made.add("TensorScatter", [past_value, values, start], [present_value], {"axis": 2})
    visible = _visible(made, position_ids, int(past_key.shape[2]), int(node.attrs["window"]))
    _attend(made, [queries, present_key, present_value, visible], output)
    made.put(graph)
    return "mapped Attention to RotaryEmbedding, TensorScatter and Attention of ONNX"


def replace_context_attention(graph: gs.Graph, node: gs.Node, shared: dict[str, gs.Tensor]) -> str:
    query, key, value, cos, sin, mask = node.inputs
    (output,) = node.outputs
    node.outputs.clear()
    made = Replacement(node, shared)
    angles = _half(made, cos, query), _half(made, sin, query)
    kv_heads = int(node.attrs["num_kv_heads"])
    queries = _rotated(made, "query", query, int(node.attrs["num_heads"]), angles)
    keys = _rotated(made, "key", key, kv_heads, angles)
    _attend(made, [queries, keys, _split(made, "value", value, kv_heads), mask], output)
    made.put(graph)
    return "mapped ContextAttention to RotaryEmbedding and Attention of ONNX"


def _heads_obstacle(node: gs.Node) -> str | None:
    for tensor, heads in zip(node.inputs[:3], ("num_heads", "num_kv_heads", "num_kv_heads"), strict=True):
        size = tensor.shape[-1] if tensor.shape else None
        if not isinstance(size, int) or len(tensor.shape) != 3:
            return f"{tensor.name} is not [batch, sequence, size] of a known size"
        if size % (2 * node.attrs[heads]):
            return f"{tensor.name} does not divide into {node.attrs[heads]} heads of an even size"
    return None


def _angles_obstacle(angles: gs.Tensor, query: gs.Tensor) -> str | None:
    """``RotaryEmbedding`` takes one half of what our ops take, so both have to be equal."""
    shape = angles.shape
    if shape is None or len(shape) != 4 or shape[1] != 1 or not isinstance(shape[-1], int):
        return f"{angles.name} is not [batch, 1, sequence, head size] of a known size"
    if shape[0] not in (1, query.shape[0]):
        return f"{angles.name} is for a batch of {shape[0]}, {query.name} for one of {query.shape[0]}"
    return None if _halves_are_equal(angles) else f"the halves of {angles.name} are not known to be equal"


def _halves_are_equal(tensor: gs.Tensor) -> bool:
    """Whether along the last axis the second half repeats the first, by how the tensor is computed."""
    constant = small_constant(tensor)
    if constant is not None:
        low, high = np.split(constant, 2, axis=-1)
        return bool(np.array_equal(low, high))
    node = producer_of(tensor)
    if node is None or node.domain not in ("", None):
        return False
    if node.op == "Concat":
        first, *others = node.inputs
        last = node.attrs["axis"] in (-1, len(tensor.shape or ()) - 1)
        return last and len(others) == 1 and others[0] is first
    if node.op in ("Mul", "Div") and (factor := small_constant(node.inputs[1])) is not None and factor.size == 1:
        return _halves_are_equal(node.inputs[0])
    if node.op in _VIEWS:
        before, after = node.inputs[0].shape, tensor.shape
        return bool(before and after) and before[-1] == after[-1] and _halves_are_equal(node.inputs[0])
    return node.op in _SAME_EVERYWHERE and _halves_are_equal(node.inputs[0])


def _half(made: Replacement, angles: gs.Tensor, query: gs.Tensor) -> gs.Tensor:
    """``[batch, 1, sequence, D]`` → ``[batch, sequence, D / 2]`` with the query's batch."""
    batch, _, length, size = angles.shape
    rows = made.share(
        f"{angles.name}.rows", "Squeeze", [angles, made.integers("one", [1])], angles.dtype, [batch, length, size]
    )
    bounds = [made.integers("zero", [0]), made.integers(f"is.{size // 2}", [size // 2]), made.integers("two", [2])]
    half = made.share(f"{angles.name}.half", "Slice", [rows, *bounds], angles.dtype, [batch, length, size // 2])
    if batch == query.shape[0]:
        return half
    start = {"start": 0, "end": 1}
    rows_of_batch = made.share(f"{query.name}.batch", "Shape", [query], _INT64, [1], start)
    shape = made.share(
        f"{query.name}.batch_shape", "Concat", [rows_of_batch, made.integers("ones", [1, 1])], _INT64, [3], {"axis": 0}
    )
    batches = [query.shape[0], length, size // 2]
    return made.share(f"{angles.name}.halves", "Expand", [half, shape], angles.dtype, batches)


def _split(made: Replacement, name: str, rows: gs.Tensor, heads: int) -> gs.Tensor:
    """``[batch, sequence, heads * D]`` → ``[batch, heads, sequence, D]``."""
    batch, length, size = rows.shape
    shape = made.integers(f"heads.{heads}", [0, 0, heads, -1])
    split = made.compute(f"{name}_rows", "Reshape", [rows, shape], rows.dtype, [batch, length, heads, size // heads])
    turned = [batch, heads, length, size // heads]
    return made.compute(f"{name}_heads", "Transpose", [split], rows.dtype, turned, {"perm": [0, 2, 1, 3]})


def _rotated(
    made: Replacement, name: str, rows: gs.Tensor, heads: int, angles: tuple[gs.Tensor, gs.Tensor]
) -> gs.Tensor:
    split = _split(made, name, rows, heads)
    return made.compute(f"{name}_rotated", "RotaryEmbedding", [split, *angles], rows.dtype, split.shape)


def _first_slots(made: Replacement, position_ids: gs.Tensor) -> gs.Tensor:
    """The slot at which each sequence's new tokens begin, ``[batch]``."""
    inputs = [position_ids, made.integers("first", 0)]
    return made.share(f"{position_ids.name}.first", "Gather", inputs, _INT64, position_ids.shape[:1], {"axis": 1})


def _visible(made: Replacement, position_ids: gs.Tensor, slots: int, window: int) -> gs.Tensor:
    """Which slots each query sees, bool ``[batch, 1, sequence, slots]``: those up to its own, at most ``window`` of them."""
    batch, length = position_ids.shape
    shape, name = [batch, 1, length, slots], position_ids.name
    numbers = made.integers(f"slots.{slots}", range(slots))
    axes = made.integers("rows_and_slots", [1, 3])
    own = made.share(f"{name}.own", "Unsqueeze", [position_ids, axes], _INT64, [batch, 1, length, 1])
    past = made.share(f"{name}.past.{slots}", "LessOrEqual", [numbers, own], _BOOL, shape)
    if window <= 0:
        return past
    size = made.integers(f"is.{window}", [window])
    oldest = made.share(f"{name}.oldest.{window}", "Sub", [own, size], _INT64, [batch, 1, length, 1])
    recent = made.share(f"{name}.recent.{window}.{slots}", "Greater", [numbers, oldest], _BOOL, shape)
    return made.share(f"{name}.visible.{window}.{slots}", "And", [past, recent], _BOOL, shape)


def _attend(made: Replacement, inputs: list[gs.Tensor], output: gs.Tensor) -> None:
    """``output``: ``[batch, sequence, heads * D]``."""
    query = inputs[0]
    batch, heads, length, size = query.shape
    attributes: dict[str, Any] = {"scale": float(made.node.attrs["scale"]), "softmax_precision": onnx.TensorProto.FLOAT}
    mixed = made.compute("mixed_heads", "Attention", inputs, query.dtype, query.shape, attributes)
    turned = {"perm": [0, 2, 1, 3]}
    rows = made.compute("mixed_rows", "Transpose", [mixed], query.dtype, [batch, length, heads, size], turned)
    made.add("Reshape", [rows, made.integers("joined_heads", [0, 0, -1])], [output])


def _said(dtype: Any) -> str:
    return onnx.TensorProto.DataType.Name(dtype).lower() if isinstance(dtype, int) else str(dtype)
