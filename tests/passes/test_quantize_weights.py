"""Pass quantize-weights: what it makes of every pipeline's graphs, what it leaves and why, and that the numbers are those that
codes stand for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from graphs import program as written
from graphs import whole
from programs import GRID, MAX_SEQ_LEN, Programs, Subject
from readers import ArrayReader

from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.config import ExportOptions
from moecompiler.debugging.observe import feeds_of
from moecompiler.debugging.unquantized import quantized_as
from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program, check, load_program, serialize
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.passes.quantize_weights import QuantizeWeights
from moecompiler.passes.selection import Selection, identity
from moecompiler.pipeline import apply, run_passes
from moecompiler.quantization.recipe import QuantizationRecipe, Rule, default_recipe
from moecompiler.quantization.schemes import INT8, NVFP4, WeightScheme, int4
from moecompiler.validation.scenario import Step
from moecompiler.weights import Recipe

INT4, ASYMMETRIC = int4(64), int4(64, symmetric=False)
MIXED = QuantizationRecipe(
    (Rule("*.3.block_sparse_moe.*", None), Rule("*.self_attn.*", INT8), Rule("*.experts.*", INT4))
)


def exported(programs: Programs, shipped: Subject, dtype: str = "float32") -> Program:
    return programs.exported(shipped.config, GRID["one-rank"], 0, ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN))


def ops(program: Program) -> Counter[str]:
    nodes = program.model.graph.node
    kinds = ("Linear", "MoE", "Dequantize")
    return Counter(node.op_type for node in nodes if node.op_type.startswith(kinds))


def logits(program: Program, weights: WeightCache) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 9))
    step = Step(tokens, np.tile(np.arange(9), (2, 1)), np.array([8, 4]))
    return np.asarray(open_program(program, weights, 1).run(["logits"], feeds_of(program, step, tokens))[0])


@pytest.mark.parametrize(
    ("pipeline", "recipe", "dtype", "made"),
    [
        ("plugins", default_recipe(INT8), "float32", {"LinearInt8": 8, "MoEInt8": 4}),
        ("plugins", MIXED, "bfloat16", {"LinearInt8": 8, "MoEInt4": 3, "MoE": 1}),
        ("onnxruntime", default_recipe(ASYMMETRIC), "float32", {"LinearInt4Asymmetric": 8, "MoEInt4Asymmetric": 4}),
        ("plugins", default_recipe(NVFP4), "bfloat16", {"LinearNvfp4": 8, "MoENvfp4": 4}),
        ("ootb", default_recipe(NVFP4), "bfloat16", {"DequantizeLinear": 48}),
        ("ootb", default_recipe(INT8), "bfloat16", {"DequantizeLinear": 24}),
        ("ootb", default_recipe(ASYMMETRIC), "float32", {"DequantizeLinear": 48}),
        ("debug", default_recipe(INT4), "float32", {"DequantizeLinear": 24}),
    ],
)
def test_every_pipeline(
    programs: Programs, shipped: Subject, pipeline: str, recipe: QuantizationRecipe, dtype: str, made: dict[str, int]
) -> None:
    """One rank of the trained model, against the graph before any pass with the numbers that codes stand for."""
    before = exported(programs, shipped, dtype)
    after, _ = run_passes(named_pipelines(recipe)[pipeline], before)
    assert ops(after) == made
    if pipeline != "onnxruntime":  # which is of an opset that onnx's checker takes, and its shape inference does not
        check(after)
    bodies = {function.name for function in after.model.functions}
    assert bodies == {node.op_type for node in after.model.graph.node if node.domain == DOMAIN}
    again, nothing = apply(QuantizeWeights(recipe), after)
    assert nothing.changes == ()
    assert again.model.SerializeToString(deterministic=True) == after.model.SerializeToString(deterministic=True)
    weights = WeightCache(shipped.reader)
    got, floats = logits(after, weights), logits(before, weights)
    (expected,) = (logits(each, weights) for each in quantized_as([before], [after]))
    np.testing.assert_allclose(got, expected, atol=5e-5, rtol=0)
    assert np.abs(expected - floats).max() > 0.02  # so it was quantized
    whole, left = (sum(recipe.nbytes for recipe in each.weights.values()) for each in (before, after))
    assert left < 0.8 * whole


def test_what_the_files_hold(programs: Programs, shipped: Subject, tmp_path: Path) -> None:
    """A program that was written and read again has the same recipes; merged projections are one weight."""
    after, results = run_passes(named_pipelines(MIXED)["plugins"], exported(programs, shipped, "bfloat16"))
    changes = [change.what for result in results for change in result.changes if result.name == "quantize-weights"]
    assert len(changes) == 11
    assert "quantized model.layers.0.self_attn.qkv_proj.weight.T: int8 per channel" in changes
    codes, scales = (after.weights[f"model.layers.0.self_attn.qkv_proj.weight.{part}"] for part in ("codes", "scales"))
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == ("int8", (384, 128), "bfloat16", (384,))
    assert codes.sources == {f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkv"}
    experts = after.weights["model.layers.2.mlp.experts.down_proj.scales"]
    assert (experts.dtype, experts.shape) == ("bfloat16", (8 * 128, 256 // 64))
    path = tmp_path / "rank0.onnx"
    for file, content in zip((path, path.with_suffix(".weights.json")), serialize(after, "rank0"), strict=True):
        file.write_bytes(content)
    assert load_program(path).weights == after.weights


def test_its_parameters_are_part_of_what_it_is() -> None:
    """A graph that was quantized by one recipe is not taken for another's."""
    identities = [
        identity(Selection("ootb", quantization=default_recipe(each)).passes()) for each in (INT8, INT4, INT4)
    ]
    assert identities[0] != identities[1] == identities[2]
    assert [step.name for step in Selection("plugins,quantize-weights").passes()][-1] == "quantize-weights"


GRAPH = """g (float[n, 32] x) => (float[n, 16] y, float[n, 16] z) {
    ["m.self_attn.q_proj/MatMul_1"] y = MatMul (x, q)
    ["m.self_attn.k_proj/MatMul_2"] z = MatMul (x, k) }"""
Q, K = "m.self_attn.q_proj.weight", "m.self_attn.k_proj.weight"
WEIGHTS = {"q": whole(Q, 32, 16), "k": whole(K, 32, 16)}
BOTH = default_recipe(INT8)


def why(recipe: QuantizationRecipe, text: str = GRAPH, weights: dict[str, Recipe] | None = None) -> list[str]:
    """Why nodes that read a weight which is to be quantized are left, and how many others were not."""
    result = apply(QuantizeWeights(recipe), written(text, WEIGHTS if weights is None else weights))[1]
    return [f"{result.matches} made", *(f"{each.node}: {each.reason}" for each in result.missed)]


def test_only_what_the_recipe_names() -> None:
    assert why(QuantizationRecipe((Rule("*.k_proj", INT8),))) == ["1 made"]
    assert why(QuantizationRecipe(())) == ["0 made"]
    # whatever a recipe says, norms, embeddings and router are kept; the head is, unless a rule names it
    other = {"q": whole("m.block_sparse_moe.gate.weight", 32, 16), "k": whole("model.embed_tokens.weight", 32, 16)}
    assert why(QuantizationRecipe((Rule("*", INT8),)), weights=other) == ["0 made"]
    head = {"q": whole("m.block_sparse_moe.gate.weight", 32, 16), "k": whole("lm_head.weight", 32, 16)}
    assert why(BOTH, weights=head) == ["0 made"]
    assert why(QuantizationRecipe((Rule("lm_head", INT8),)), weights=head) == ["1 made"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("MatMul (x, k)", "MatMul (x, q)", None),  # two readers of one weight
        ("MatMul (x, q)", "Gemm (x, q)", "Gemm is neither MoE nor a product"),
        (
            "y = MatMul (x, q)",
            "t = Transpose <perm = [0, 1]> (q) y = MatMul (x, t)",
            "Transpose is neither MoE nor a product",
        ),
    ],
)
def test_almost_products(old: str, new: str, said: str | None) -> None:
    left = why(BOTH, GRAPH.replace(old, new))
    assert left[0] == ("2 made" if said is None else "1 made")
    assert [each.partition(": ")[2] for each in left[1:]] == ([] if said is None else [said])


def test_weights_that_are_one_tensor_are_asked_for_alike() -> None:
    text = GRAPH.replace("(x, k)", "(x, q)")
    merged = {"q": Recipe("float32", (32, 16), (*whole(Q, 32, 8).pieces, *whole(K, 32, 8).pieces))}
    _, *missed = why(QuantizationRecipe((Rule("*.q_proj", INT8),)), text, merged)
    assert len(missed) == 2
    assert (
        "m.self_attn.k_proj and m.self_attn.q_proj are one weight here, and are to be quantized differently"
        in missed[0]
    )
    assert why(BOTH, text, merged) == ["2 made"]


def test_readers_of_one_weight_share_its_codes() -> None:
    after, _ = apply(QuantizeWeights(BOTH), written(GRAPH.replace("(x, k)", "(x, q)"), WEIGHTS))
    assert sorted(after.weights) == ["q.codes", "q.scales"]
    assert {tuple(node.input) for node in after.model.graph.node} == {("x", "q.codes", "q.scales")}


def test_experts_of_one_op_are_asked_for_alike(programs: Programs, shipped: Subject) -> None:
    recipe = QuantizationRecipe((Rule("*.w2", INT4), Rule("*.experts.*", INT8)))
    with pytest.raises(
        UserError, match=r"gate_up_proj and .*down_proj are weights of one op, and are to be quantized diff"
    ):
        run_passes(named_pipelines(recipe)["plugins"], exported(programs, shipped))
    after, _ = run_passes(named_pipelines(recipe)["ootb"], exported(programs, shipped))  # where they are two products
    assert {r.quantized.scheme for r in after.weights.values() if r.quantized} == {INT4, INT8}


@pytest.mark.parametrize("size", [24, 48])
def test_groups_that_do_not_divide(size: int) -> None:
    scheme: WeightScheme = int4(size)
    with pytest.raises(UserError, match=f"^q: groups of {size} do not divide its 32 input features"):
        why(default_recipe(scheme))


def test_the_numbers_of_a_product_with_each_experts_weight() -> None:
    """``[experts, in, out]``: rows of all experts are dequantized at once."""
    name = "m.mlp.experts.down_proj"
    text = """g (float[2, n, 32] x) => (float[2, n, 16] y) { ["m.mlp.experts/MatMul_1"] y = MatMul (x, w) }"""
    stored = np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32)
    before = written(text, {"w": whole(name, 2, 16, 32).transposed((0, 2, 1))})
    after, result = apply(QuantizeWeights(QuantizationRecipe((Rule("*.experts.*", int4(32)),))), before)
    assert (result.matches, result.missed) == (1, ())
    assert [node.op_type for node in after.model.graph.node] == ["DequantizeInt4", "Reshape", "Transpose", "MatMul"]
    x = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)
    weights = WeightCache(ArrayReader({name: stored}))
    (expected,) = (open_program(each, weights, 1).run(None, {"x": x})[0] for each in quantized_as([before], [after]))
    np.testing.assert_allclose(open_program(after, weights, 1).run(None, {"x": x})[0], expected, atol=1e-5)
    assert 0.1 < np.abs(expected - x @ stored.transpose(0, 2, 1)).max() < 5
