"""What TensorRT-RTX takes of ONNX's ``Attention``, which is why ``adapt_attention`` does what it does."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from moecompiler.backends.tensorrt_attention import adapt_attention
from moecompiler.backends.tensorrt_rtx_build import build_plan
from moecompiler.errors import UserError

pytestmark = pytest.mark.xdist_group("tensorrt-rtx")
KINDS = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
SLOTS = 64
DECODE, PREFILL = (1, 1, 1), (1, 20, 40)  # least, typical and most tokens of a step


def attention(dtype: str, heads: int, kv_heads: int, size: int, attributes: str = "scale = 0.3") -> onnx.ModelProto:
    kind = KINDS[dtype]
    return onnx.parser.parse_model(
        f"""<ir_version: 12, opset_import: ["" : 24]>
        g ({kind}[b, {heads}, s, {size}] q, {kind}[b, {kv_heads}, {SLOTS}, {size}] k, {kind}[b, {kv_heads}, {SLOTS}, {size}] v,
           bool[b, 1, s, {SLOTS}] seen) => ({kind}[b, {heads}, s, {size}] y)
        {{ ["m/Attention"] y = Attention<{attributes}>(q, k, v, seen) }}"""
    )


def plan_size(model: onnx.ModelProto, directory: Path, tokens: tuple[int, ...] = DECODE) -> int:
    """Bytes of the plan for steps of so many tokens."""
    path = directory / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = ({"b": batch, "s": length} for batch, length in zip((1, 4, 4), tokens, strict=True))
        shapes[value.name] = tuple(tuple(known.get(d.dim_param, d.dim_value) for d in dims) for known in sizes)
    return build_plan(path, [shapes], ["m/Attention"], ("8.9", "12.0"), lambda fraction: None).data.nbytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 1, 32), (8, 2, 96), (32, 8, 128)])
def test_where_there_is_a_fused_kernel_the_mark_changes_nothing(
    dtype: str, heads: int, kv_heads: int, size: int, tmp_path: Path
) -> None:
    plain = attention(dtype, heads, kv_heads, size)
    marked = attention(dtype, heads, kv_heads, size)
    adapt_attention(marked)
    for tokens in (DECODE, PREFILL):
        assert plan_size(marked, tmp_path, tokens) == plan_size(plain, tmp_path, tokens)


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "size", "tokens"),
    [("float32", 8, 2, 128, PREFILL), ("float16", 3, 3, 32, DECODE), ("bfloat16", 2, 1, 128, DECODE)],
)
def test_where_there_is_none_only_marked_attention_builds(
    dtype: str, heads: int, kv_heads: int, size: int, tokens: tuple[int, ...], tmp_path: Path
) -> None:
    """Float32 with several tokens, and one token with fewer than four heads."""
    model = attention(dtype, heads, kv_heads, size)
    with pytest.raises(UserError, match="not supported by a dedicated kernel"):
        plan_size(model, tmp_path, tokens)
    adapt_attention(model)
    assert plan_size(model, tmp_path, tokens) > 0


def test_the_parser_refuses_a_precision_of_the_softmax(tmp_path: Path) -> None:
    model = attention("float16", 8, 2, 128, "scale = 0.3, softmax_precision = 1")
    with pytest.raises(UserError, match=r"at m/Attention \(module m\): .*softmax precision is not supported"):
        plan_size(model, tmp_path)
    adapt_attention(model)
    assert plan_size(model, tmp_path) > 0


def test_other_nodes_are_left_alone() -> None:
    model = attention("float16", 8, 2, 128, "scale = 0.3, softmax_precision = 1")
    (node,) = model.graph.node
    node.domain = "moecompiler"
    before = model.SerializeToString()
    adapt_attention(model)
    assert model.SerializeToString() == before
