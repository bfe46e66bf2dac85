"""What a rank holds, against sizes counted by hand and against the recipes that ranks are exported with."""

from __future__ import annotations

import pytest
from programs import GRID, MAX_SEQ_LEN, Programs, Subject

from moecompiler.config import PRESETS, ExportOptions, ModelConfig
from moecompiler.mapping import Mapping
from moecompiler.passes.pipelines import named_pipelines
from moecompiler.pipeline import run_passes
from moecompiler.planning.load import Load, activation_bytes, matrix_bytes, rank_memory
from moecompiler.quantization.recipe import QuantizationRecipe, Rule, default_recipe
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, WeightScheme, int4
from moecompiler.sharding import recipe_for

MAPPINGS = [
    Mapping.create(),
    Mapping.create(8),
    Mapping.create(16),  # twice as many ranks as key-value heads
    Mapping.create(8, moe_ep_size=8),
    Mapping.create(8, 2, moe_tp_size=4, moe_ep_size=2),
    Mapping.create(2, 3),  # stages of unequal depth
]


def recipe_bytes(config: ModelConfig, mapping: Mapping, rank: int, dtype: str) -> int:
    """All that the sharding table gives a rank, save indices."""
    layers = mapping.layers(rank, config.num_hidden_layers)
    names = ["model.embed_tokens.weight"] * mapping.is_first_stage(rank)
    names += ["model.norm.weight", "lm_head.weight"] * mapping.is_last_stage(rank)
    for layer in layers:
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.self_attn.{each}_proj.weight" for each in "qkvo"]
        names += [f"{prefix}.{each}_layernorm.weight" for each in ("input", "post_attention")]
        names += [f"{prefix}.mlp.{each}" for each in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
    return sum(recipe_for(name, config, mapping, rank, dtype).nbytes for name in names)


@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
@pytest.mark.parametrize("model", sorted(PRESETS))
def test_weights_are_those_of_the_sharding_table(model: str, mapping: Mapping) -> None:
    config = PRESETS[model]
    for rank in range(0, mapping.world_size, mapping.tp_size):
        memory = rank_memory(config, mapping, rank, Load())
        assert memory.weights == recipe_bytes(config, mapping, rank, "bfloat16")


def test_the_published_sizes() -> None:
    sizes = {model: rank_memory(config, Mapping(), 0, Load()).weights for model, config in PRESETS.items()}
    assert sizes == {"8x7b": 2 * 46_702_792_704, "8x22b": 2 * 140_620_634_112}


def test_the_cache() -> None:
    config = PRESETS["8x7b"]
    assert rank_memory(config, Mapping(), 0, Load(batch=4, slots=1024)).cache == 131_072 * 4 * 1024
    assert rank_memory(config, Mapping.create(8, 2), 0, Load(batch=4, slots=1024)).cache == 131_072 * 4 * 1024 // 16
    # two ranks hold the same head
    assert rank_memory(config, Mapping.create(16), 0, Load(batch=4, slots=1024)).cache == 131_072 * 4 * 1024 // 8
    assert rank_memory(config, Mapping(), 0, Load(cache_bytes=1, batch=1, slots=8)).cache == 65_536 * 8


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (None, 2 * 64 * 256),
        (INT8, 64 * 256 + 64 * 2),
        (FP8, 64 * 256 + 64 * 2),  # a scale for each row, all alike
        (int4(128), 64 * 128 + 64 * 2 * 2),
        (int4(128, symmetric=False), 64 * 128 + 64 * 2 * (2 + 1)),
        (NVFP4, 64 * 128 + 64 * 16 + 64 * 4),
    ],
    ids=str,
)
def test_a_matrix(scheme: WeightScheme | None, expected: int) -> None:
    assert matrix_bytes((64, 256), 2, scheme) == expected
    assert matrix_bytes((3, 64, 256), 2, scheme) == 3 * expected


def test_a_recipe_names_layers_and_the_head() -> None:
    config = PRESETS["8x7b"].with_layers(2)
    first = QuantizationRecipe(
        (Rule("model.layers.0.*.experts.*", None), Rule("lm_head", INT8), *default_recipe(INT8).rules)
    )
    plain, all_codes, memory = (
        rank_memory(config, Mapping(), 0, Load(recipe=r)) for r in (None, default_recipe(INT8), first)
    )
    assert memory.experts == (plain.experts + all_codes.experts) // 2
    assert memory.attention == all_codes.attention < plain.attention
    assert memory.head == 32000 * 4096 + 32000 * 2
    assert all_codes.head == plain.head == 2 * 32000 * 4096


def test_activations_are_counted_by_hand() -> None:
    config = PRESETS["8x7b"]
    assert activation_bytes(config, Mapping(), Load(batch=1, step_tokens=1)) == (
        2 * (4 * 4096 + (64 + 16) * 128 + 2 * (2 * 4096 + 3 * 14336)) + 8 * 32000
    )


@pytest.mark.parametrize(
    ("mapping", "scheme"),
    [("one-rank", INT8), ("one-rank", int4(128, symmetric=False)), ("ep2-pp2", None), ("ep2-pp2", NVFP4)],
    ids=str,
)
def test_weights_are_those_of_exported_ranks(
    mapping: str, scheme: WeightScheme | None, programs: Programs, shipped: Subject
) -> None:
    recipe = None if scheme is None else default_recipe(scheme)
    for rank in range(0, GRID[mapping].world_size, GRID[mapping].tp_size):
        options = ExportOptions("bfloat16", max_seq_len=MAX_SEQ_LEN)
        exported = programs.exported(shipped.config, GRID[mapping], rank, options)
        program, _ = run_passes(named_pipelines(recipe)["plugins"], exported)
        held = sum(each.nbytes for each in program.weights.values() if each.dtype != "int64")
        assert rank_memory(shipped.config, GRID[mapping], rank, Load(recipe=recipe)).weights == held
