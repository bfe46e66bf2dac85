"""``quantization_config`` as the four families of tools write it, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moecompiler.errors import UserError
from moecompiler.quantization.published_config import (
    Layout,
    PublishedConfig,
    load_published_config,
    parse_published_config,
)
from moecompiler.quantization.schemes import FP8, NVFP4, Format, Granularity, WeightScheme, int4

AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["gate"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPTQ = {
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "actorder": None}
E4M3 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
E2M1 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quant_method": "modelopt"}


def compressed(weights: Any, form: str = "pack-quantized", inputs: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    data = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return data | {"ignore": ["lm_head", "re:.*block_sparse_moe.gate"], "kv_cache_scheme": None} | more


def modelopt(algorithm: str | None, **more: Any) -> dict[str, Any]:
    """As in ``hf_quant_config.json``."""
    return MODELOPT | {"quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]} | more}


CASES: list[tuple[dict[str, Any], PublishedConfig]] = [
    (AWQ, PublishedConfig("awq", Layout.AWQ, int4(128, symmetric=False))),
    (AWQ | {"version": "GEMM", "group_size": 64}, PublishedConfig("awq", Layout.AWQ, int4(64, symmetric=False))),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True},
        PublishedConfig("awq", Layout.AWQ, int4(128, symmetric=False)),
    ),
    (GPTQ, PublishedConfig("gptq", Layout.GPTQ_V1, int4(128))),
    (
        GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2", "sym": False, "dynamic": {"-:lm_head": {}}},
        PublishedConfig("gptq", Layout.GPTQ_V2, int4(128, symmetric=False), act_order=True),
    ),
    (GPTQ | {"desc_act": True, "group_size": -1}, PublishedConfig("gptq", Layout.GPTQ_V1, int4(None))),
    (GPTQ | {"desc_act": True, "static_groups": True}, PublishedConfig("gptq", Layout.GPTQ_V1, int4(128))),
    (compressed(INT4), PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(128))),
    (
        compressed(INT4 | {"symmetric": False, "actorder": "weight"}),
        PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(128, symmetric=False)),
    ),
    (
        compressed(INT4 | {"actorder": "group"}),
        PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(128), act_order=True),
    ),
    (
        compressed(INT4 | {"strategy": "channel", "group_size": None}),
        PublishedConfig("compressed-tensors", Layout.CT_INT4, int4(None)),
    ),
    (
        compressed(E4M3, "float-quantized", E4M3, kv_cache_scheme=E4M3),
        PublishedConfig("compressed-tensors", Layout.CT_FP8, FP8, activations="static", kv_cache="fp8"),
    ),
    (
        compressed(E4M3 | {"strategy": "channel"}, "float-quantized", E4M3 | {"strategy": "token", "dynamic": True}),
        PublishedConfig(
            "compressed-tensors",
            Layout.CT_FP8,
            WeightScheme(Format.E4M3, Granularity.CHANNEL),
            activations="dynamic",
        ),
    ),
    (modelopt("FP8"), PublishedConfig("modelopt", Layout.MODELOPT_FP8, FP8, activations="static")),
    (
        modelopt("NVFP4", group_size=16, kv_cache_quant_algo="FP8"),
        PublishedConfig("modelopt", Layout.MODELOPT_NVFP4, NVFP4, activations="static", kv_cache="fp8"),
    ),
    (
        compressed(E2M1, "nvfp4-pack-quantized", E2M1 | {"dynamic": "local"}),
        PublishedConfig("compressed-tensors", Layout.CT_NVFP4, NVFP4, activations="static"),
    ),
    (compressed(E2M1, "nvfp4-pack-quantized"), PublishedConfig("compressed-tensors", Layout.CT_NVFP4, NVFP4)),
    (  # as in config.json
        MODELOPT | {"quant_algo": "FP8", "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
        PublishedConfig("modelopt", Layout.MODELOPT_FP8, FP8, activations="static", kv_cache="fp8"),
    ),
]


@pytest.mark.parametrize(("data", "expected"), CASES)
def test_what_tools_write_is_understood(data: dict[str, Any], expected: PublishedConfig) -> None:
    assert parse_published_config(data, "config") == expected


def groups(*weights: dict[str, Any]) -> dict[str, Any]:
    return compressed(INT4) | {"config_groups": {f"group_{i}": {"weights": w} for i, w in enumerate(weights)}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes'; supported are awq, gptq, compressed-tensors",
        ),
        ({}, "quant_method is None"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"bits": 8}, "bits is 8; weights of 4 bits"),
        (AWQ | {"bits": "4"}, 'bits is "4"; it must be of type int'),
        (AWQ | {"bits": True}, "bits is true; it must be of type int"),
        (AWQ | {"zero_point": False}, "zero_point is false"),
        ({"quant_method": "awq", "bits": 4}, "has no group_size"),
        (AWQ | {"group_size": 0}, "group_size is 0; it must be -1"),
        (GPTQ | {"group_size": 100}, "group_size is 100; it must be -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"dynamic": {r"+:.*\.w1": {"bits": 8}}}, r"dynamic gives '+:.*\\.w1' settings of its own"),
        (GPTQ | {"dynamic": 3}, "dynamic is 3; it must be of type dict"),
        (GPTQ | {"sym": "yes"}, 'sym is "yes"; it must be of type bool'),
        (groups(INT4, E4M3), "config_groups gives 2 ways to quantize weights (group_0, group_1); it must be one"),
        (groups(), "config_groups is empty"),
        (compressed(None), "group_0: says nothing of weights"),
        (compressed(INT4 | {"num_bits": 8}), "8-bit int by group, stored as 'pack-quantized'; supported are"),
        (compressed(INT4, "nvfp4-pack-quantized"), "4-bit int by group, stored as 'nvfp4-pack-quantized'; supported"),
        (compressed(E4M3 | {"strategy": "block"}, "float-quantized"), "8-bit float by block"),
        (
            compressed(E2M1 | {"group_size": 32}, "nvfp4-pack-quantized"),
            "group_0.weights: group_size is 32; NVFP4 has 16",
        ),
        (
            compressed(E2M1, "nvfp4-pack-quantized", E4M3),
            "activations of 4-bit float, or none quantized, are supported",
        ),
        (compressed(INT4, inputs=INT4 | {"num_bits": 8}), "group_0.input_activations: is {"),
        (compressed(INT4, kv_cache_scheme=INT4), "kv_cache_scheme: is {"),
        (compressed(INT4) | {"config_groups": [1]}, "config_groups is [1]; it must be of type dict"),
        (modelopt("W4A16_AWQ"), "quant_algo is 'W4A16_AWQ'; of ModelOpt's, 'FP8' and 'NVFP4' are supported"),
        (modelopt(None), "quant_algo is None"),
        (modelopt("NVFP4", group_size=32), "group_size is 32; NVFP4 has 16"),
        (modelopt("FP8", kv_cache_quant_algo="NVFP4"), 'KV cache: is "NVFP4"'),
        (MODELOPT | {"quantization": "FP8"}, "quantization is str, not a JSON object"),
    ],
)
def test_what_is_refused_is_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_published_config(data, "dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")
    assert "\n" not in str(error.value)


def test_where_it_is_found(tmp_path: Path) -> None:
    assert load_published_config(tmp_path) is None
    config, beside = tmp_path / "config.json", tmp_path / "hf_quant_config.json"
    config.write_text('{"model_type": "mixtral"}')
    assert load_published_config(tmp_path) is None
    beside.write_text(json.dumps({k: v for k, v in modelopt("FP8").items() if k != "quant_method"}))
    assert load_published_config(tmp_path).layout is Layout.MODELOPT_FP8
    config.write_text(json.dumps({"quantization_config": AWQ}))
    assert load_published_config(tmp_path).layout is Layout.AWQ
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not a JSON object"),
        ('{"quantization_config": "awq"}', "quantization_config is str, not a JSON object"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            load_published_config(tmp_path)
