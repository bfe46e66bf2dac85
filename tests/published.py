"""Published quantized checkpoints for tests: the shipped model's first layers as AutoAWQ, GPTQModel and compressed-tensors
pack them. That these layouts are theirs is what ``quantization/test_published.py`` shows, on layers that they packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from moecompiler.checkpoint import expected_tensors, open_checkpoint
from moecompiler.config import load_config
from moecompiler.quantization.arithmetic import dequantize, quantize
from moecompiler.quantization.packing import AWQ_ORDER, IN_ORDER, pack_bytes, pack_words
from moecompiler.quantization.published import linear_stacks
from moecompiler.quantization.schemes import FP8, NVFP4, Format, Granularity, QuantizedTensor, WeightScheme, int4

TINY_MIXTRAL = Path(__file__).parent / "data" / "tiny-mixtral"
GROUP = 64
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """``config``: the ``quantization_config``; ``layout``: ``awq``, ``gptq`` or ``packed``."""

    layout: str
    scheme: WeightScheme
    config: dict[str, Any]
    act_order: bool = False


def _gptq(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True} | settings


def _packed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, **weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
_NVFP4_PACKED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": _FP4, "input_activations": _FP4 | {"dynamic": "local"}}
    },
}

KINDS = {
    "awq": Kind(
        "awq",
        int4(GROUP, symmetric=False),
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "gptq": Kind("gptq", int4(GROUP), _gptq()),
    "gptq-act-order": Kind("gptq", int4(GROUP), _gptq(desc_act=True), act_order=True),
    "gptq-act-order-asymmetric": Kind(
        "gptq", int4(GROUP, symmetric=False), _gptq(desc_act=True, sym=False), act_order=True
    ),
    "compressed-tensors": Kind("packed", int4(GROUP), _packed(strategy="group", group_size=GROUP, symmetric=True)),
    "compressed-tensors-rows": Kind(
        "packed", int4(None, symmetric=False), _packed(strategy="channel", symmetric=False)
    ),
    "modelopt-nvfp4": Kind("nvfp4", NVFP4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    "compressed-tensors-nvfp4": Kind("packed_nvfp4", NVFP4, _NVFP4_PACKED),
}


def _float_quantized(by: str, **activations: Any) -> dict[str, Any]:
    eight = {"type": "float", "num_bits": 8}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": by},
        "input_activations": eight | {"strategy": "tensor", "dynamic": False} | activations,
    }
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


_FP8_ROWS = WeightScheme(Format.E4M3, Granularity.CHANNEL)
FP8_KINDS = {
    "modelopt-fp8": Kind("fp8", FP8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "compressed-tensors-fp8": Kind("fp8", _FP8_ROWS, _float_quantized("channel")),
    "compressed-tensors-fp8-dynamic": Kind(
        "fp8_dynamic", _FP8_ROWS, _float_quantized("channel", strategy="token", dynamic=True)
    ),
}


def save_published(
    directory: Path, kind: Kind, *, layers: int = 1, plain: Collection[str] = (), seed: int = 0
) -> Arrays:
    """Saves the checkpoint in ``directory``, its weights whose names hold one of ``plain`` not quantized; returns all weights by
    published name, those that are quantized as the float32 numbers that codes stand for."""
    whole = load_config(TINY_MIXTRAL)
    config = whole.with_layers(layers)
    source, shapes = open_checkpoint(TINY_MIXTRAL, whole), expected_tensors(config)
    weights = {name: source.read(name, (0,) * len(shape), shape).astype(np.float32) for name, shape in shapes.items()}
    stored = dict(weights)
    for stack in linear_stacks(config):
        for linear in stack:
            if any(part in linear for part in plain):
                continue
            # what is joined has one order: queries, keys and values, and gate and up
            joined = linear.replace(".w3", ".w1").replace(".k_proj", ".q_proj").replace(".v_proj", ".q_proj")
            tensor = _quantized(stored.pop(f"{linear}.weight"), kind, [seed, *joined.encode()])
            if kind.layout == "packed_nvfp4" and tensor.global_scale is not None:  # its reciprocal is what is stored
                tensor = replace(tensor, global_scale=np.float32(1) / (np.float32(1) / tensor.global_scale))
            wide = tensor if kind.scheme.two_level else replace(tensor, scales=tensor.scales.astype(np.float32))
            weights[f"{linear}.weight"] = dequantize(wide)
            stored |= {f"{linear}.{suffix}": array for suffix, array in PACK[kind.layout](tensor).items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, directory / "model.safetensors")
    settings = json.loads((TINY_MIXTRAL / "config.json").read_text())
    settings |= {"num_hidden_layers": layers, "dtype": "float16", "quantization_config": kind.config}
    (directory / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json", "heldout.txt"):
        shutil.copyfile(TINY_MIXTRAL / name, directory / name)
    return weights


def _quantized(weight: np.ndarray, kind: Kind, seed: list[int]) -> QuantizedTensor:
    """In float16 scales; with act-order, groups are of features from all over the row."""
    if not kind.act_order:
        return quantize(weight, kind.scheme, "float16")
    features = weight.shape[1]
    # within a group in their own order, as whoever reads g_idx puts them
    order = np.random.default_rng(seed).permutation(features).reshape(-1, GROUP)
    order = np.sort(order, axis=1).reshape(-1)
    return replace(quantize(np.ascontiguousarray(weight[:, order]), kind.scheme, "float16"), order=order)


def _words(codes: np.ndarray, order: tuple[int, ...] = IN_ORDER) -> np.ndarray:
    return pack_words(np.ascontiguousarray(codes), order)


def _unsigned(tensor: QuantizedTensor) -> np.ndarray:
    return (tensor.codes + np.int8(8)).astype(np.uint8) if tensor.scheme.symmetric else tensor.codes


def _by_group(values: np.ndarray) -> np.ndarray:
    """``[out, groups]``, of whole rows too."""
    return values.reshape(len(values), -1)


def _zero_points(tensor: QuantizedTensor) -> np.ndarray:
    zeros = tensor.zero_points if tensor.zero_points is not None else np.full(tensor.scales.shape, 8, np.uint8)
    return _by_group(zeros)


def _pack_awq(tensor: QuantizedTensor) -> Arrays:
    return {
        "qweight": _words(tensor.codes.T, AWQ_ORDER),
        "qzeros": _words(_zero_points(tensor).T, AWQ_ORDER),
        "scales": _by_group(tensor.scales).T,
    }


def _pack_gptq(tensor: QuantizedTensor) -> Arrays:
    """Version 1, and, as old ones have it, a bias of zeros."""
    out, features = tensor.shape
    order = np.arange(features) if tensor.order is None else tensor.order
    codes, group_of = np.empty((out, features), np.uint8), np.empty(features, np.int32)
    codes[:, order] = _unsigned(tensor)
    group_of[order] = np.arange(features) // GROUP
    return {
        "qweight": _words(codes).T,
        "qzeros": _words((_zero_points(tensor).T - np.uint8(1)) & np.uint8(15)),
        "scales": _by_group(tensor.scales).T,
        "g_idx": group_of,
        "bias": np.zeros(out, np.float16),
    }


def _pack_packed(tensor: QuantizedTensor) -> Arrays:
    stored = {
        "weight_packed": _words(_unsigned(tensor)),
        "weight_scale": _by_group(tensor.scales),
        "weight_shape": np.array(tensor.shape, np.int64),
    }
    return stored if tensor.scheme.symmetric else stored | {"weight_zero_point": _words(_zero_points(tensor).T).T}


def _pack_fp8(tensor: QuantizedTensor) -> Arrays:
    return _pack_fp8_dynamic(tensor) | {"input_scale": np.array(0.01, np.float32)}


def _pack_fp8_dynamic(tensor: QuantizedTensor) -> Arrays:
    return {"weight": tensor.codes, "weight_scale": tensor.scales[:, None] if tensor.scales.ndim else tensor.scales}


def _pack_nvfp4(tensor: QuantizedTensor) -> Arrays:
    assert tensor.global_scale is not None
    scales = {"weight_scale": tensor.scales, "weight_scale_2": tensor.global_scale}
    return {"weight": pack_bytes(tensor.codes), "input_scale": np.array(0.5, np.float32), **scales}


def _pack_packed_nvfp4(tensor: QuantizedTensor) -> Arrays:
    stored = _pack_nvfp4(tensor)
    divisor = np.float32(1) / stored["weight_scale_2"]
    return {
        "weight_packed": stored["weight"],
        "weight_scale": stored["weight_scale"],
        "weight_global_scale": np.reshape(divisor, 1),
        "input_global_scale": np.array([2], np.float32),
    }


PACK = {
    "awq": _pack_awq,
    "gptq": _pack_gptq,
    "packed": _pack_packed,
    "fp8": _pack_fp8,
    "fp8_dynamic": _pack_fp8_dynamic,
    "nvfp4": _pack_nvfp4,
    "packed_nvfp4": _pack_packed_nvfp4,
}
