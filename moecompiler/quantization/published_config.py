"""How a published checkpoint says that it is quantized: ``config.json``'s ``quantization_config``, or ModelOpt's file beside it.

As written by AutoAWQ 0.2.9 (``AwqConfig``), AutoGPTQ and GPTQModel 7.7 (``QuantizeConfig``), compressed-tensors 0.20
(``QuantizationConfig``) and ModelOpt 0.47 (``hf_quant_config.json``, and ``convert_hf_config``'s form of it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from moecompiler.checkpoint_files import read_json
from moecompiler.errors import UserError
from moecompiler.quantization.schemes import FP8, NVFP4, NVFP4_BLOCK, Format, Granularity, WeightScheme, int4

MODELOPT_FILE = "hf_quant_config.json"
METHODS = ("awq", "gptq", "compressed-tensors", "modelopt")

Kind = TypeVar("Kind", str, int, bool, list, dict)


class Layout(StrEnum):
    """Which tensors a quantized linear layer has, and how they are packed; ``published_layouts`` describes them."""

    AWQ = "awq"
    GPTQ_V1 = "gptq"
    GPTQ_V2 = "gptq_v2"
    CT_INT4 = "pack-quantized"
    CT_FP8 = "float-quantized"
    MODELOPT_FP8 = "FP8"
    MODELOPT_NVFP4 = "NVFP4"
    CT_NVFP4 = "nvfp4-pack-quantized"


@dataclass(frozen=True)
class PublishedConfig:
    """``scheme`` is that of every quantized weight. ``act_order``: input features may be grouped in another order than they
    have. ``activations``: how the activations that meet the weights were meant to be quantized, ``"static"``, ``"dynamic"``
    or ``None``. ``kv_cache``: ``"fp8"`` or ``None``."""

    method: str
    layout: Layout
    scheme: WeightScheme
    act_order: bool = False
    activations: str | None = None
    kv_cache: str | None = None

    @property
    def held_scheme(self) -> WeightScheme:
        """``scheme``, and whether features are in another order."""
        return replace(self.scheme, act_order=self.act_order)

    @property
    def described(self) -> str:
        """Bits of weights and of the activations that meet them, as NVIDIA writes it, and who made it: ``W4A16 (awq)``. NVFP4's
        activations are not quantized here, whatever it was made for: ``W4A16 (modelopt, made for W4A4)``."""
        bits = self.scheme.format.bits
        made_for = f"W{bits}A{bits if self.activations else 16}"
        if self.scheme.two_level and self.activations:
            return f"W{bits}A16 ({self.method}, made for {made_for})"
        return f"{made_for} ({self.method})"


def load_published_config(model_dir: Path) -> PublishedConfig | None:
    """What ``model_dir`` says of its quantization; ``None`` where it says nothing.

    Raises: UserError where a file is no JSON object, or says what ``parse_published_config`` does not take.
    """
    for name, key in (("config.json", "quantization_config"), (MODELOPT_FILE, None)):
        path = model_dir / name
        if not path.exists():
            continue
        data = read_json(path)
        if key is None:
            return parse_published_config({"quant_method": "modelopt"} | data, str(path))
        if data.get(key):
            if not isinstance(data[key], dict):
                raise UserError(f"{path}: {key} is {type(data[key]).__name__}, not a JSON object")
            return parse_published_config(data[key], f"{path}: {key}")
    return None


def parse_published_config(data: Mapping[str, Any], where: str) -> PublishedConfig:
    """The content of a ``quantization_config``, or of ``hf_quant_config.json`` with a ``quant_method`` added.

    Raises: UserError that begins with ``where`` and names the key, where a method, format or setting is not supported.
    """
    method = data.get("quant_method")
    if method == "awq":
        return _awq(data, where)
    if method == "gptq":
        return _gptq(data, where)
    if method == "compressed-tensors":
        return _compressed_tensors(data, where)
    if method == "modelopt":
        return _modelopt(data, where)
    raise UserError(f"{where}: quant_method is {method!r}; supported are {', '.join(METHODS)}")


def _awq(data: Mapping[str, Any], where: str) -> PublishedConfig:
    version = str(data.get("version") or data.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise UserError(f"{where}: version is {version!r}; of AWQ's layouts 'gemm' is supported")
    _bits(_first(data, ("bits", "w_bit"), int, where), where)
    if not _first(data, ("zero_point",), bool, where, True):
        raise UserError(f"{where}: zero_point is false; AWQ weights are supported with zero points")
    group = _group(_first(data, ("group_size", "q_group_size"), int, where), where)
    return PublishedConfig("awq", Layout.AWQ, int4(group, symmetric=False))


def _gptq(data: Mapping[str, Any], where: str) -> PublishedConfig:
    form = data.get("checkpoint_format") or data.get("format") or "gptq"
    if data.get("is_marlin_format"):
        form = "marlin"
    if form not in (Layout.GPTQ_V1, Layout.GPTQ_V2):
        raise UserError(f"{where}: checkpoint_format is {form!r}; supported are 'gptq' and 'gptq_v2'")
    _bits(_first(data, ("bits",), int, where), where)
    mixed = [pattern for pattern in _first(data, ("dynamic",), dict, where, {}) if not pattern.startswith("-:")]
    if mixed:
        raise UserError(
            f"{where}: dynamic gives {mixed[0]!r} settings of its own; all quantized layers must have the same"
        )
    group = _group(_first(data, ("group_size",), int, where), where)
    symmetric = _first(data, ("sym",), bool, where, True)
    # with static groups, or one group, features keep their places whatever order they were quantized in
    moved = _first(data, ("desc_act",), bool, where, False) and not _first(data, ("static_groups",), bool, where, False)
    return PublishedConfig(
        "gptq", Layout(form), int4(group, symmetric=symmetric), act_order=moved and group is not None
    )


def _compressed_tensors(data: Mapping[str, Any], where: str) -> PublishedConfig:
    groups = _first(data, ("config_groups",), dict, where)
    if not groups:
        raise UserError(f"{where}: config_groups is empty; it must say how weights are quantized")
    forms = {json.dumps(_weights_of(group, f"{where}: {name}"), sort_keys=True) for name, group in groups.items()}
    if len(forms) != 1:
        raise UserError(
            f"{where}: config_groups gives {len(forms)} ways to quantize weights ({', '.join(groups)}); it must be one"
        )
    name, group = next(iter(groups.items()))
    weights = group["weights"]
    where_weights = f"{where}: {name}.weights"
    form = group.get("format") or data.get("format")
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy = weights.get("strategy") or ("tensor" if not weights.get("group_size") else "group")
    if form == Layout.CT_INT4 and (kind, bits) == ("int", 4) and strategy in ("group", "channel"):
        size = (
            _group(_first(weights, ("group_size",), int, where_weights), where_weights) if strategy == "group" else None
        )
        scheme = int4(size, symmetric=_first(weights, ("symmetric",), bool, where_weights, True))
    elif form == Layout.CT_FP8 and (kind, bits) == ("float", 8) and strategy in ("tensor", "channel"):
        scheme = WeightScheme(Format.E4M3, Granularity(strategy))
    elif form == Layout.CT_NVFP4 and (kind, bits, strategy) == ("float", 4, "tensor_group"):
        scheme = NVFP4
        if weights.get("group_size") != NVFP4_BLOCK:
            raise UserError(f"{where_weights}: group_size is {weights.get('group_size')!r}; NVFP4 has {NVFP4_BLOCK}")
    else:
        raise UserError(
            f"{where_weights}: {bits}-bit {kind} by {strategy}, stored as {form!r}; supported are 4-bit int by group or channel"
            " stored as 'pack-quantized', 8-bit float by tensor or channel stored as 'float-quantized', and 4-bit float by"
            " tensor_group stored as 'nvfp4-pack-quantized'"
        )
    # the group order of 2025 and before: true, "group" or "dynamic"; "weight" and "static" leave features in their places
    act_order = weights.get("actorder") in (True, "group", "dynamic") and scheme.block_size is not None
    return PublishedConfig(
        "compressed-tensors",
        Layout(form),
        scheme,
        act_order,
        _activations(group.get("input_activations"), scheme, f"{where}: {name}.input_activations"),
        _kv_cache(data.get("kv_cache_scheme"), f"{where}: kv_cache_scheme"),
    )


def _weights_of(group: Any, where: str) -> dict[str, Any]:
    """What decides how a config group's weights are stored."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise UserError(f"{where}: says nothing of weights; checkpoints with quantized weights are supported")
    ignored = ("observer", "observer_kwargs", "dynamic")
    return {key: value for key, value in group["weights"].items() if value is not None and key not in ignored} | {
        "format": group.get("format"),
        "activations": bool(group.get("input_activations")),
    }


def _activations(scheme: Any, weights: WeightScheme, where: str) -> str | None:
    if not scheme:
        return None
    bits = 4 if weights.two_level else 8
    if not isinstance(scheme, dict) or (scheme.get("type"), scheme.get("num_bits")) != ("float", bits):
        raise UserError(
            f"{where}: is {_short(scheme)}; activations of {bits}-bit float, or none quantized, are supported"
        )
    if scheme.get("dynamic") == "local":  # blocks' scales are found as it runs, the global one is stored
        return "static"
    return "dynamic" if scheme.get("dynamic") else "static"


def _kv_cache(scheme: Any, where: str) -> str | None:
    if not scheme:
        return None
    is_fp8 = scheme == "FP8" or (
        isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    )
    if not is_fp8:
        raise UserError(f"{where}: is {_short(scheme)}; a cache of 8-bit float, or none quantized, is supported")
    return "fp8"


def _modelopt(data: Mapping[str, Any], where: str) -> PublishedConfig:
    inner = data.get("quantization", data)  # hf_quant_config.json nests it, config.json does not
    if not isinstance(inner, dict):
        raise UserError(f"{where}: quantization is {type(inner).__name__}, not a JSON object")
    algorithm = inner.get("quant_algo")
    kv_cache = _kv_cache(inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"), f"{where}: KV cache")
    if algorithm == "FP8":
        return PublishedConfig("modelopt", Layout.MODELOPT_FP8, FP8, activations="static", kv_cache=kv_cache)
    if algorithm == "NVFP4":
        size = inner.get("group_size", NVFP4_BLOCK)
        if size != NVFP4_BLOCK:
            raise UserError(f"{where}: group_size is {size!r}; NVFP4 has {NVFP4_BLOCK}")
        return PublishedConfig("modelopt", Layout.MODELOPT_NVFP4, NVFP4, activations="static", kv_cache=kv_cache)
    raise UserError(f"{where}: quant_algo is {algorithm!r}; of ModelOpt's, 'FP8' and 'NVFP4' are supported")


_REQUIRED: Any = object()


def _first(
    data: Mapping[str, Any], keys: tuple[str, ...], kind: type[Kind], where: str, default: Any = _REQUIRED
) -> Kind:
    """The value of the first of ``keys`` that is there. Raises: UserError where it is of another type, or absent and required."""
    for key in keys:
        value = data.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{where}: {key} is {_short(value)}; it must be of type {kind.__name__}")
        return value
    if default is _REQUIRED:
        raise UserError(f"{where}: has no {keys[0]}")
    return default


def _bits(bits: int, where: str) -> None:
    if bits != 4:
        raise UserError(f"{where}: bits is {bits}; weights of 4 bits are supported")


def _group(size: int, where: str) -> int | None:
    """A group size; -1 stands for a whole row."""
    if size != -1 and (size < 8 or size % 8):
        raise UserError(f"{where}: group_size is {size}; it must be -1 (a whole row) or a multiple of 8")
    return None if size == -1 else size


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
