"""Our norms and attention as ONNX's own operators: what is mapped, what stays and why, and that numbers stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from graphs import check_pass, program, run

from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program, check
from moecompiler.ops import OpSpec, add_function
from moecompiler.passes.standard_ops import StandardOps
from moecompiler.pipeline import apply, run_passes
from moecompiler.plugins.attention.op import ATTENTION, CONTEXT_ATTENTION
from moecompiler.plugins.rmsnorm.op import ADD_RMS_NORM, RMS_NORM

TYPES = {"float32": "float", "float16": "float16"}
SLOTS = 16


def with_functions(it: Program, *specs: OpSpec) -> Program:
    for spec in specs:
        add_function(it.model, spec)
    check(it)
    return it


def standard_ops(it: Program) -> Counter[str]:
    return Counter(node.op_type for node in it.model.graph.node if node.domain == "")


def test_norms_become_rms_normalizations() -> None:
    signature = "g (float16[b, s, 8] x, float16[b, s, 8] r) => (float16[b, s, 8] z, float16[b, s, 8] sum)"
    weight = "<float16[8] w = {1, 2, 3, 4, 5, 6, 7, 8}, float16[b, s, 8] y>"
    before = program(
        f"""{signature} {weight} {{
        ["m.norm1/RMSNorm_1"] y = moecompiler.RMSNorm<epsilon = 0.5>(x, w)
        ["m.norm2/AddRMSNorm_2"] z, sum = moecompiler.AddRMSNorm<epsilon = 0.25>(r, y, w) }}"""
    )
    after = program(
        f"""{signature} {weight} {{
        ["m.norm1/RMSNorm_1.0.RMSNormalization"] y = RMSNormalization<axis = -1, epsilon = 0.5, stash_type = 1>(x, w)
        ["m.norm2/AddRMSNorm_2.0.Add"] sum = Add(r, y)
        ["m.norm2/AddRMSNorm_2.1.RMSNormalization"]
          z = RMSNormalization<axis = -1, epsilon = 0.25, stash_type = 1>(sum, w) }}"""
    )
    said = [
        "mapped RMSNorm to RMSNormalization: m.norm1/RMSNorm_1",
        "mapped AddRMSNorm to Add and RMSNormalization: m.norm2/AddRMSNorm_2",
    ]
    check_pass(StandardOps(), with_functions(before, RMS_NORM, ADD_RMS_NORM), after, said)
    made, _ = apply(StandardOps(), before)
    check(made)
    assert not made.model.functions
    assert [(each.domain, each.version) for each in made.model.opset_import if not each.domain] == [("", 24)]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_norm_keeps_its_numbers(dtype: str) -> None:
    """ONNX Runtime rounds a float16 norm once, after the weight; the body, as MixtralRMSNorm, before and after: two roundings."""
    kind = TYPES[dtype]
    text = f"""g ({kind}[b, s, 64] x, {kind}[64] w) => ({kind}[b, s, 64] y)
        {{ ["norm/RMSNorm_1"] y = moecompiler.RMSNorm<epsilon = 1e-5>(x, w) }}"""
    before = with_functions(program(text), RMS_NORM)
    after, _ = apply(StandardOps(), before)
    rng = np.random.default_rng(0)
    feeds = {"x": 9 * rng.standard_normal((3, 5, 64)), "w": rng.standard_normal(64)}
    feeds = {name: array.astype(dtype) for name, array in feeds.items()}
    (wanted,), (got,) = run(before, feeds), run(after, feeds)
    np.testing.assert_allclose(got, wanted, rtol=2 * np.finfo(dtype).eps, atol=0)


def attention(dtype: str, heads: int, kv_heads: int, size: int, window: int, layers: int = 1) -> Program:
    """Layers side by side over the same inputs, each with a cache of its own; angles as the rank module makes them."""
    kind = TYPES[dtype]
    cache = f"{kind}[b, {kv_heads}, {SLOTS}, {size}]"
    q, kv = f"{kind}[b, s, {heads * size}]", f"{kind}[b, s, {kv_heads * size}]"
    caches = ", ".join(f"{cache} k{i}, {cache} v{i}" for i in range(layers))
    outputs = ", ".join(f"{q} y{i}, {cache} k{i}_new, {cache} v{i}_new" for i in range(layers))
    attributes = f"num_heads = {heads}, num_kv_heads = {kv_heads}, scale = {size**-0.5}, window = {window}"
    nodes = [
        f'["l.{i}/Attention_{i}"] y{i}, k{i}_new, v{i}_new = moecompiler.Attention<{attributes}>'
        f"(q, k, v, cos, sin, position_ids, k{i}, v{i})"
        for i in range(layers)
    ]
    text = f"""g ({q} q, {kv} k, {kv} v, float[b, 1, s, {size // 2}] angles, int64[b, s] position_ids, {caches})
        => ({outputs}) <{kind}[b, 1, s, {size}] cos, {kind}[b, 1, s, {size}] sin> {{
        ["r/Concat"] both = Concat<axis = -1>(angles, angles)
        ["r/Cos"] wide_cos = Cos(both)
        ["r/Sin"] wide_sin = Sin(both)
        ["r/Cast_1"] cos = Cast<to = {10 if dtype == "float16" else 1}>(wide_cos)
        ["r/Cast_2"] sin = Cast<to = {10 if dtype == "float16" else 1}>(wide_sin)
        {chr(10).join(nodes)} }}"""
    return with_functions(program(text), ATTENTION)


def attention_feeds(before: Program, dtype: str, first: Sequence[int], length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in before.model.graph.input:
        dims = [{"b": len(first), "s": length}.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(dims).astype("float32" if value.name == "angles" else dtype)
    feeds["position_ids"] = np.array(first)[:, None] + np.arange(length)
    return feeds


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 8), (4, 4, 6), (3, 1, 16)])
def test_attention_keeps_its_numbers(dtype: str, window: int, heads: int, kv_heads: int, size: int) -> None:
    """Prefill, later tokens and single tokens of a ragged batch, up to the last slot of the cache."""
    before = attention(dtype, heads, kv_heads, size, window)
    after, result = apply(StandardOps(), before)
    assert result.matches == 1
    check(after)
    assert {"RotaryEmbedding": 2, "TensorScatter": 2, "Attention": 1}.items() <= standard_ops(after).items()
    # float16: Attention scales q and k by the root of the scale and rounds them, the body scales the product in float32
    bound = 1e-6 if dtype == "float32" else 4e-3
    for first, length in (((0, 0, 0), 4), ((3, 0, 12), 4), ((15, 7, 0), 1)):
        feeds = attention_feeds(before, dtype, first, length)
        wanted, got = run(before, feeds), run(after, feeds)
        for mine, theirs in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=bound, rtol=bound)
        np.testing.assert_array_equal(got[2], wanted[2])


def test_layers_share_the_mask_and_the_angles_however_often_the_pass_runs() -> None:
    before = attention("float16", 8, 2, 8, 5, layers=3)
    after, _ = apply(StandardOps(), before)
    part, some = apply(StandardOps(), before, limit=2)
    assert some.matches == 2
    rest, _ = apply(StandardOps(), part)
    for made in (after, rest):
        check(made)
        counts = standard_ops(made)
        assert (counts["LessOrEqual"], counts["Greater"], counts["Slice"], counts["Gather"]) == (1, 1, 2, 1)
        assert counts["Attention"] == 3
    assert rest.model.SerializeToString(deterministic=True) == after.model.SerializeToString(deterministic=True)


def _unequal_halves(nodes: Mapping[str, gs.Node]) -> None:
    node = nodes["r/Concat"]
    node.inputs[1] = gs.Constant("other", np.ones((1, 1, 1, 4), np.float32))


def _halves_one_after_another(nodes: Mapping[str, gs.Node]) -> None:
    nodes["r/Concat"].attrs["axis"] = 2


def _turned_by_what_varies(nodes: Mapping[str, gs.Node]) -> None:
    node = nodes["r/Cos"]
    node.op, node.inputs = "Add", [node.inputs[0], gs.Constant("phase", np.arange(8, dtype=np.float32))]


def _slots_unknown(nodes: Mapping[str, gs.Node]) -> None:
    nodes["l.1/Attention_1"].inputs[6].shape[2] = "slots"


def _odd_heads(nodes: Mapping[str, gs.Node]) -> None:
    nodes["l.1/Attention_1"].attrs["num_heads"] = 64


@pytest.mark.parametrize(
    ("change", "left", "reason"),
    [
        (_unequal_halves, 2, "the halves of cos are not known to be equal"),
        (_halves_one_after_another, 2, "the halves of cos are not known to be equal"),
        (_turned_by_what_varies, 2, "the halves of cos are not known to be equal"),
        (_slots_unknown, 1, "the number of slots of k1 is not known"),
        (_odd_heads, 1, "q does not divide into 64 heads of an even size"),
    ],
)
def test_attention_that_cannot_be_mapped_stays_and_says_why(
    change: Callable[[Mapping[str, gs.Node]], None], left: int, reason: str
) -> None:
    graph = gs.import_onnx(attention("float32", 8, 2, 8, 0, layers=2).model)
    change({node.name: node for node in graph.nodes})
    before = Program(gs.export_onnx(graph, do_type_check=False))
    after, result = apply(StandardOps(), before)
    assert Counter(node.op_type for node in after.model.graph.node if node.domain == DOMAIN)["Attention"] == left
    assert [missed.reason for missed in result.missed] == [reason] * left
    assert [function.name for function in after.model.functions] == ["Attention"]
    with pytest.raises(UserError, match=r"standard-ops: did not match in l\.. .*--allow_missed"):
        run_passes([StandardOps()], before)


CONTEXT = """g ({t}[b, s, 32] q, {t}[b, s, 16] k, {t}[b, s, 16] v, float[{angles}, s, 4] angles, {mask}[b, 1, s, s] mask)
    => ({t}[b, s, 32] y) <{t}[{angles}, 1, s, 8] cos, {t}[{angles}, 1, s, 8] sin, int64[1] one = {{1}},
    float half = {{0.5}}> {{
    both = Concat<axis = -1>(angles, angles)
    wide_cos = Cos(both)
    scaled_cos = Mul(wide_cos, half)
    one_cos = Cast<to = {code}>(scaled_cos)
    cos = Unsqueeze(one_cos, one)
    wide_sin = Sin(both)
    one_sin = Cast<to = {code}>(wide_sin)
    sin = Unsqueeze(one_sin, one)
    ["m/ContextAttention_1"]
    y = moecompiler.ContextAttention<num_heads = 4, num_kv_heads = 2, scale = 0.3>(q, k, v, cos, sin, mask) }}"""


def context_attention(dtype: str, angles: str = "1", mask: str = "") -> Program:
    kind, code = TYPES[dtype], 10 if dtype == "float16" else 1
    text = CONTEXT.format(t=kind, angles=angles, mask=mask or kind, code=code)
    return with_functions(program(text), CONTEXT_ATTENTION)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("angles", ["1", "b"])
def test_context_attention_keeps_its_numbers(dtype: str, angles: str) -> None:
    before = context_attention(dtype, angles)
    after, result = apply(StandardOps(), before)
    assert result.matches == 1
    check(after)
    assert {"RotaryEmbedding": 2, "Attention": 1}.items() <= standard_ops(after).items()
    assert "TensorScatter" not in standard_ops(after)
    rng = np.random.default_rng(0)
    for batch, length in ((1, 1), (3, 7)):
        feeds: dict[str, Any] = {
            name: rng.standard_normal((batch, length, size)).astype(dtype)
            for name, size in (("q", 32), ("k", 16), ("v", 16))
        }
        feeds["angles"] = rng.standard_normal((batch if angles == "b" else 1, length, 4)).astype(np.float32)
        future = np.triu(np.ones((length, length), bool), 1)
        feeds["mask"] = np.broadcast_to(np.where(future, np.finfo(dtype).min, 0), (batch, 1, length, length)).astype(
            dtype
        )
        bound = 1e-6 if dtype == "float32" else 4e-3
        np.testing.assert_allclose(run(after, feeds)[0], run(before, feeds)[0], atol=bound, rtol=bound)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (context_attention("float16", mask="float"), "the mask mask is float32, the query float16"),
        (context_attention("float32", angles="2"), "cos is for a batch of 2, q for one of b"),
    ],
    ids=["mask", "batch"],
)
def test_context_attention_that_cannot_be_mapped_stays(before: Program, reason: str) -> None:
    after, result = apply(StandardOps(), before)
    assert result.matches == 0
    assert [missed.reason for missed in result.missed] == [reason]
    assert after.model.opset_import == before.model.opset_import
    assert len(after.model.graph.node) == len(before.model.graph.node)


def test_a_graph_of_an_opset_unknown_here_is_left_alone() -> None:
    before = attention("float32", 8, 2, 8, 0)
    for holder in (before.model, *before.model.functions):
        next(each for each in holder.opset_import if not each.domain).version = 25
    _, result = apply(StandardOps(), before)
    assert [missed.reason for missed in result.missed] == ["the graph is of opset 25, not 21 to 24"]


def test_opset_24_leaves_the_meaning_of_operators_of_21() -> None:
    """What the pass relies on when it raises a graph: since 21, operators got types and optional attributes, nothing else."""
    changed = {}
    for schema in onnx.defs.get_all_schemas():
        if schema.domain or not onnx.defs.has(schema.name, max_inclusive_version=21):
            continue
        old, new = (onnx.defs.get_schema(schema.name, version) for version in (21, 24))
        assert [value.name for value in new.inputs] == [value.name for value in old.inputs]
        assert not new.deprecated or old.deprecated
        assert old.attributes.keys() <= new.attributes.keys()
        if added := new.attributes.keys() - old.attributes.keys():
            changed[schema.name] = added
    assert changed == {
        "Cast": {"round_mode"},
        "CastLike": {"round_mode"},
        "DequantizeLinear": {"output_dtype"},
        "QuantizeLinear": {"precision"},
    }
