"""Published layouts: what others packed on the CPU (``tests/data/quantized/make.py``) stands for the numbers that their own code
makes of it; and what is wrong with a checkpoint is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import tiny_config

from moecompiler.config import parse_config
from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.quantization.arithmetic import dequantize, quantize
from moecompiler.quantization.packing import pack_bytes
from moecompiler.quantization.published import (
    check_parallel,
    linear_stacks,
    published_recipe,
    quantized_layers,
    read_kv_scales,
    read_linear,
)
from moecompiler.quantization.published_config import Layout, PublishedConfig
from moecompiler.quantization.published_layouts import tensors_of
from moecompiler.quantization.schemes import FP8, NVFP4, Format, Granularity, WeightScheme, int4
from moecompiler.safetensors_file import map_tensor, read_header

DATA = Path(__file__).parents[1] / "data" / "quantized"
SHAPE = (32, 64)
FP8_CHANNEL = WeightScheme(Format.E4M3, Granularity.CHANNEL)
CASES = {
    "autoawq": PublishedConfig("awq", Layout.AWQ, int4(32, symmetric=False)),
    "gptqmodel/v1_sym": PublishedConfig("gptq", Layout.GPTQ_V1, int4(32)),
    "gptqmodel/v1_act_order": PublishedConfig("gptq", Layout.GPTQ_V1, int4(32), act_order=True),
    "gptqmodel/v2_asym": PublishedConfig("gptq", Layout.GPTQ_V2, int4(32, symmetric=False)),
    "compressed-tensors/int4_sym": PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(32)),
    "compressed-tensors/int4_asym": PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(32, symmetric=False)),
    "compressed-tensors/int4_channel": PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(None)),
    "compressed-tensors/fp8_tensor": PublishedConfig("compressed-tensors", Layout.CT_FP8, FP8),
    "compressed-tensors/fp8_channel": PublishedConfig("compressed-tensors", Layout.CT_FP8, FP8_CHANNEL),
    "compressed-tensors/nvfp4": PublishedConfig("compressed-tensors", Layout.CT_NVFP4, NVFP4),
    "modelopt/fp8": PublishedConfig("modelopt", Layout.MODELOPT_FP8, FP8),
    "modelopt/nvfp4": PublishedConfig("modelopt", Layout.MODELOPT_NVFP4, NVFP4),
}
MODEL = parse_config(tiny_config(num_hidden_layers=2), "tiny")
LINEAR = [name for stack in linear_stacks(MODEL) for name in stack]


def stored(case: str) -> dict[str, np.ndarray]:
    """The layer of a case, called "layer"."""
    file, _, prefix = case.partition("/")
    header = read_header(DATA / f"{file}.safetensors")
    start = f"{prefix}." if prefix else ""
    return {
        f"layer.{name.removeprefix(start)}": map_tensor(tensor)
        for name, tensor in header.items()
        if name.startswith(start)
    }


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_who_packed_them(case: str) -> None:
    tensors = stored(case)
    tensor = read_linear(CASES[case], tensors, "layer", SHAPE).weight
    assert tensor.scheme == CASES[case].scheme
    assert tensor.codes.dtype == tensor.scheme.format.dtype
    assert tensor.shape == SHAPE
    assert tensor.scales.shape == tensor.scheme.scale_shape(SHAPE)
    theirs = tensors["layer.dequantized"]
    ours = dequantize(tensor, str(theirs.dtype))
    assert np.unique(theirs).size > 100  # it says something
    np.testing.assert_array_equal(ours, theirs)


def test_fp8_and_nvfp4_quantize_as_modelopt() -> None:
    original = map_tensor(read_header(DATA / "modelopt.safetensors")["original"])
    for case, scheme in (("modelopt/fp8", FP8), ("modelopt/nvfp4", NVFP4)):
        theirs = read_linear(CASES[case], stored(case), "layer", SHAPE).weight
        ours = quantize(original, scheme, "float32")
        np.testing.assert_array_equal(ours.scales.astype(np.float32), theirs.scales.astype(np.float32))
        np.testing.assert_array_equal(dequantize(ours), dequantize(theirs))
    assert pack_bytes(ours.codes).shape == stored("modelopt/nvfp4")["layer.weight"].shape
    np.testing.assert_array_equal(pack_bytes(ours.codes), stored("modelopt/nvfp4")["layer.weight"])


def test_old_gptq_counts_zero_points_modulo_16() -> None:
    tensors = stored("gptqmodel/v2_asym")
    tensors["layer.qzeros"] = np.full_like(
        tensors["layer.qzeros"], -1
    )  # 15 everywhere, which stands for 0 in version 1
    config = replace(CASES["gptqmodel/v2_asym"], layout=Layout.GPTQ_V1)
    assert not read_linear(config, tensors, "layer", SHAPE).weight.zero_points.any()


def test_whole_rows_as_groups() -> None:
    tensors = stored("gptqmodel/v2_asym")
    for name in ("layer.qzeros", "layer.scales"):
        tensors[name] = tensors[name][:1]
    tensors["layer.g_idx"] = np.zeros(64, np.int32)
    tensor = read_linear(
        PublishedConfig("gptq", Layout.GPTQ_V2, int4(None, symmetric=False)), tensors, "layer", SHAPE
    ).weight
    assert tensor.scales.shape == tensor.zero_points.shape == (32,)
    assert tensor.order is None


def test_old_compressed_tensors_with_groups_in_another_order() -> None:
    tensors = stored("compressed-tensors/int4_sym")
    group_of = np.random.default_rng(0).permutation(np.arange(64) // 32)
    config = replace(CASES["compressed-tensors/int4_sym"], act_order=True)
    tensor = read_linear(config, tensors | {"layer.weight_g_idx": group_of}, "layer", SHAPE).weight
    plain = read_linear(CASES["compressed-tensors/int4_sym"], tensors, "layer", SHAPE).weight
    expected = plain.codes * plain.scales[:, group_of].astype(np.float32)
    np.testing.assert_array_equal(dequantize(tensor), expected.astype(np.float16))


def test_scales_of_activations_and_cache() -> None:
    static = replace(CASES["modelopt/fp8"], activations="static")
    tensors = stored("modelopt/fp8") | {"layer.input_scale": np.float32([0.25])}
    assert read_linear(static, tensors, "layer", SHAPE).input_scale == 0.25
    with pytest.raises(UserError, match=r"layer\.input_scale: missing"):
        read_linear(static, stored("modelopt/fp8"), "layer", SHAPE)
    for names in (("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")):
        scales = {f"attn.{names[0]}": np.float32(0.5).reshape(()), f"attn.{names[1]}": np.float32([2])}
        assert read_kv_scales(scales, "attn") == (0.5, 2.0)
        with pytest.raises(UserError, match=rf"attn\.{names[1]}: missing"):
            read_kv_scales({f"attn.{names[0]}": np.float32([1])}, "attn")
    assert read_kv_scales({}, "attn") is None


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = change(tensors[name].copy())

    return apply


def with_first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        ("autoawq", lambda t: t.pop("layer.qzeros"), "layer.qzeros: missing; the checkpoint's configuration says"),
        ("autoawq", changed("layer.scales", with_first(0)), "1 of 64 are zero or below"),
        ("autoawq", changed("layer.scales", with_first(np.nan)), "1 of 64 are NaN or infinity"),
        ("autoawq", changed("layer.qweight", lambda a: a.T), "layer.qweight: is [4, 64], expected [64, 4]"),
        ("autoawq", changed("layer.qweight", lambda a: a.astype(np.int64)), "layer.qweight: is int64, expected int32"),
        ("gptqmodel/v1_sym", changed("layer.qzeros", lambda a: a + 1), "layer.qzeros: are not all 8, but"),
        ("gptqmodel/v1_sym", changed("layer.g_idx", lambda a: a[::-1]), "layer.g_idx: puts features in another order"),
        (
            "gptqmodel/v1_act_order",
            changed("layer.g_idx", np.zeros_like),
            "does not put 32 features into each of 2 groups",
        ),
        ("gptqmodel/v1_act_order", lambda t: t.pop("layer.g_idx"), "layer.g_idx: missing"),
        ("compressed-tensors/int4_asym", lambda t: t.pop("layer.weight_zero_point"), "weight_zero_point: missing"),
        (
            "compressed-tensors/fp8_tensor",
            changed("layer.weight_scale", with_first(np.inf)),
            "1 of 1 are NaN or infinity",
        ),
        ("modelopt/fp8", changed("layer.weight", with_first(np.nan)), "layer.weight: holds NaN"),
        ("modelopt/nvfp4", changed("layer.weight_scale", with_first(0)), "1 of 128 are zero or below"),
        (
            "modelopt/nvfp4",
            changed("layer.weight_scale_2", with_first(-1)),
            "layer.weight_scale_2: 1 of 1 are zero or below",
        ),
        (
            "modelopt/nvfp4",
            changed("layer.weight_scale", lambda a: a.astype(ml_dtypes.bfloat16)),
            "expected float8_e4m3fn",
        ),
    ],
)
def test_a_broken_layer_is_one_line(case: str, spoil: Callable, message: str) -> None:
    tensors = stored(case)
    spoil(tensors)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_linear(CASES[case], tensors, "layer", SHAPE)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"layer: groups of 48 do not divide its 64 input features"):
        read_linear(replace(CASES["autoawq"], scheme=int4(48, symmetric=False)), stored("autoawq"), "layer", SHAPE)
    with pytest.raises(UserError, match=r"layer\.qweight: 33 features do not fill words of 8"):
        read_linear(CASES["autoawq"], stored("autoawq"), "layer", (33, 64))


def names_of(config: PublishedConfig, plain: tuple[str, ...] = ()) -> set[str]:
    """A checkpoint's tensors by name, ``plain`` layers not quantized."""
    suffixes = {layer: ("weight",) if layer.endswith(plain) else tensors_of(config) for layer in LINEAR}
    return {f"{layer}.{suffix}" for layer, some in suffixes.items() for suffix in some}


@pytest.mark.parametrize("case", CASES)
def test_which_layers_are_quantized(case: str) -> None:
    config = CASES[case]
    assert len(set(LINEAR)) == 2 * (4 + 3 * MODEL.num_local_experts)
    assert quantized_layers(config, names_of(config), MODEL, "dir") == set(LINEAR)
    experts_only = quantized_layers(config, names_of(config, ("_proj",)), MODEL, "dir")
    assert experts_only == {name for name in LINEAR if "experts" in name}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_a_set_of_layers(case: str) -> None:
    config = CASES[case]
    with pytest.raises(
        UserError, match=f"dir: says {config.method}, but none of the model's linear layers is quantized"
    ):
        quantized_layers(config, names_of(config, ("",)), MODEL, "dir")
    with pytest.raises(
        UserError, match=r"mixed formats across experts: model\.layers\.0\.block_sparse_moe\.experts\.1\.w3 not"
    ):
        quantized_layers(config, names_of(config, ("0.block_sparse_moe.experts.1.w3",)), MODEL, "dir")
    missing = tensors_of(config)[1]
    some = names_of(config) - {f"model.layers.1.self_attn.q_proj.{missing}"}
    if tensors_of(config) == ("weight", "weight_scale"):  # without scales, it is a plain weight
        assert "model.layers.1.self_attn.q_proj" not in quantized_layers(config, some, MODEL, "dir")
    else:
        with pytest.raises(UserError, match=rf"but model\.layers\.1\.self_attn\.q_proj has no {missing};"):
            quantized_layers(config, some, MODEL, "dir")


def test_act_order_is_not_split_over_ranks() -> None:
    ordered, plain = (
        published_recipe(CASES[f"gptqmodel/{case}"], LINEAR, MODEL) for case in ("v1_act_order", "v1_sym")
    )
    check_parallel(plain, MODEL, Mapping.create(tp_size=2), "dir")
    check_parallel(ordered, MODEL, Mapping.create(pp_size=2), "dir")
    with pytest.raises(UserError, match=r"dir: quantized with act-order.* --tp_size 2; use --tp_size 1"):
        check_parallel(ordered, MODEL, Mapping.create(tp_size=2), "dir")
