"""Static scales that other tools calibrated, as a ``Calibration``.

- Published checkpoints with ``hf_quant_config.json`` (ModelOpt) or a ``quantization_config`` in ``config.json`` (ModelOpt,
  compressed-tensors): ``LINEAR.input_scale``, and ``published.read_kv_scales``'s.
- TensorRT-LLM's checkpoints (``config.json`` with ``quantization``, ``rankN.safetensors``; ``tensorrt_llm/layers``): a layer's
  ``attention.qkv``, ``attention.dense``, ``mlp.fc`` (all experts' w1 and w3) and ``mlp.proj`` have an
  ``activation_scaling_factor``, and ``attention`` has one ``kv_cache_scaling_factor`` for keys and values. Layers count from 0
  in each pipeline stage.

A scale is amax over the largest number of the format: 448 for FP8, 6 · 448 for NVFP4's inputs, 127 for an int8 cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.calibration.files import FILE, JSON_FILE, read_calibration
from moecompiler.calibration.result import Calibration
from moecompiler.config import ModelConfig
from moecompiler.errors import UserError
from moecompiler.quantization.encodings import E2M1_MAX, E4M3_MAX, widen
from moecompiler.quantization.published import read_kv_scales
from moecompiler.quantization.published_config import load_published_config
from moecompiler.quantization.schemes import Format
from moecompiler.safetensors_file import map_tensor, read_header

INT8_MAX = 127
_SCALES = ("input_scale", "k_scale", "v_scale", "activation_scaling_factor", "kv_cache_scaling_factor")
_TRTLLM_NAME = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(?:activation|kv_cache)_scaling_factor")
_TRTLLM_LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),
    "mlp.proj": ("block_sparse_moe.experts.{e}.w2",),
}


def read_scales(path: Path, config: ModelConfig) -> Calibration:
    """What ``moecompiler calibrate`` wrote, or the scales in a checkpoint's folder that another tool made, for all of the model's
    linear layers.

    Raises: UserError where there are none, a scale is not positive and finite, or a linear layer has none.
    """
    if not path.is_dir() or any((path / name).is_file() for name in (FILE, JSON_FILE)):
        found = read_calibration(path)
    elif (quantization := _trtllm_config(path)) is not None:
        found = _read_trtllm(path, quantization, config)
    else:
        found = _read_published(path, config)
    found.check_complete(config)
    return found


def _read_published(path: Path, config: ModelConfig) -> Calibration:
    said = load_published_config(path)
    if said is None:
        raise UserError(
            f"{path}: holds no scales: neither {FILE} or {JSON_FILE} of `moecompiler calibrate`, nor a checkpoint with static"
            " scales of ModelOpt, compressed-tensors or TensorRT-LLM"
        )
    tensors = _scale_tensors(path)
    inputs = {
        name.removesuffix(".input_scale"): array for name, array in tensors.items() if name.endswith(".input_scale")
    }
    if not inputs:
        raise UserError(f"{path}: is quantized ({said.method}) and has no static scales of activations")
    largest = E4M3_MAX * (E2M1_MAX if said.scheme.format is Format.E2M1 else 1)
    found = Calibration(
        {name: _positive(array, f"{name}.input_scale") * largest for name, array in inputs.items()}, where=str(path)
    )
    attentions = [f"model.layers.{layer}.self_attn" for layer in range(config.num_hidden_layers)]
    caches = {name: scales for name in attentions if (scales := read_kv_scales(tensors, name)) is not None}
    return replace(
        found,
        keys={name: keys * E4M3_MAX for name, (keys, _) in caches.items()},
        values={name: values * E4M3_MAX for name, (_, values) in caches.items()},
    )


def _trtllm_config(path: Path) -> dict[str, Any] | None:
    """The ``config.json`` of a TensorRT-LLM checkpoint; None where the folder is none."""
    file = path / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    return data if isinstance(data, dict) and isinstance(data.get("quantization"), dict) else None


def _read_trtllm(path: Path, data: Mapping[str, Any], config: ModelConfig) -> Calibration:
    mapping = data.get("mapping") or {}
    tp, pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
    if not all(type(size) is int and size > 0 for size in (tp, pp)) or config.num_hidden_layers % pp:
        raise UserError(
            f"{path}: its mapping is tp_size {tp!r}, pp_size {pp!r}, which {config.num_hidden_layers} layers cannot be"
        )
    cache = data["quantization"].get("kv_cache_quant_algo")
    cache_largest = INT8_MAX if cache == "INT8" else E4M3_MAX
    inputs: dict[str, float] = {}
    caches: dict[str, float] = {}
    for rank in range(tp * pp):
        first = rank // tp * (config.num_hidden_layers // pp)
        for name, array in _scale_tensors(path, f"rank{rank}.safetensors").items():
            if (named := _TRTLLM_NAME.fullmatch(name)) is None:
                continue
            layer, module, scale = f"model.layers.{first + int(named[1])}", named[2], _positive(array, name)
            if module == "attention":
                _raise_to(caches, f"{layer}.self_attn", scale * cache_largest)
            for linear in _TRTLLM_LINEARS.get(module, ()):
                for expert in range(config.num_local_experts if "{e}" in linear else 1):
                    _raise_to(inputs, f"{layer}.{linear.format(e=expert)}", scale * E4M3_MAX)
    if not inputs:
        raise UserError(f"{path}: has no static scales of activations")
    return Calibration(inputs, keys=caches, values=caches, where=str(path))


def _raise_to(amaxes: dict[str, float], name: str, amax: float) -> None:
    """Ranks may have scales of their own."""
    amaxes[name] = max(amax, amaxes.get(name, 0.0))


def _scale_tensors(path: Path, pattern: str = "*.safetensors") -> dict[str, np.ndarray]:
    files = sorted(path.glob(pattern))
    if not files:
        raise UserError(f"{path}: holds no {pattern}")
    stored = {name: tensor for file in files for name, tensor in read_header(file).items()}
    return {name: map_tensor(tensor) for name, tensor in stored.items() if name.endswith(_SCALES)}


def _positive(array: np.ndarray, name: str) -> float:
    if array.size != 1:
        raise UserError(f"{name}: is {list(array.shape)}; one static scale is expected")
    scale = float(widen(np.array(array)).reshape(()))
    if not isfinite(scale) or scale <= 0:
        raise UserError(f"{name}: is {scale}; a scale must be positive and finite")
    return scale
