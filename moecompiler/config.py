"""Model configuration: what of HF's ``MixtralConfig`` decides the graph. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from moecompiler.errors import UserError

DTYPES = ("float16", "bfloat16", "float32")
SPARSE_MIXER_EPSILON = 0.01


class NormalizationMode(IntEnum):
    """How the weights of a token's experts are made of its router logits; the formulas are in ``routing``.

    Numbered as in TensorRT-LLM's ``MoeConfig.ExpertScaleNormalizationMode``.
    """

    NONE = 0
    RENORMALIZE = 1
    SPARSE_MIXER = 2


@dataclass(frozen=True)
class ExportOptions:
    """What besides model and mapping decides the graph. ``max_seq_len``: slots of the KV cache, in tokens; ``all_logits``:
    logits of every token instead of each sequence's last."""

    dtype: str = "bfloat16"
    normalization_mode: NormalizationMode = NormalizationMode.RENORMALIZE
    max_seq_len: int = 2048
    all_logits: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"normalization_mode": int(self.normalization_mode)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> ExportOptions:
        return ExportOptions(**(data | {"normalization_mode": NormalizationMode(data["normalization_mode"])}))


@dataclass(frozen=True)
class ModelConfig:
    """A Mixtral's sizes and constants, named as in ``transformers.MixtralConfig``.

    ``rope_scaling_factor`` is the factor of linear RoPE scaling (1.0: none); ``sliding_window`` is in tokens
    (``None``: every earlier token is seen); ``dtype`` is the dtype the checkpoint says it is stored in.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling_factor: float = 1.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        return ModelConfig(**(data | {"eos_token_ids": tuple(data["eos_token_ids"])}))

    def with_layers(self, num_layers: int | None) -> ModelConfig:
        """The same model cut to its first ``num_layers`` layers.

        Raises: UserError where the model has fewer.
        """
        if num_layers is None:
            return self
        if not 1 <= num_layers <= self.num_hidden_layers:
            raise UserError(f"--num_layers {num_layers}: the model has {self.num_hidden_layers} layers; give 1 to that")
        return replace(self, num_hidden_layers=num_layers)


_MIXTRAL_8X7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=32768,
)
_MIXTRAL_8X22B = replace(
    _MIXTRAL_8X7B,
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=56,
    num_attention_heads=48,
    max_position_embeddings=65536,
)
PRESETS = {"8x7b": _MIXTRAL_8X7B, "8x22b": _MIXTRAL_8X22B}


def load_config(source: str | Path) -> ModelConfig:
    """Reads a preset's name (``8x7b``, ``8x22b``), a ``config.json``, or a directory that holds one.

    Raises: UserError where there is no such file, it is no JSON, or it is not a Mixtral that this program can build.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; give a preset ({', '.join(PRESETS)}), a config.json or its folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not a JSON object")
    return parse_config(data, where=str(path))


def parse_config(data: dict[str, Any], where: str) -> ModelConfig:
    """Turns the content of an HF ``config.json`` into a ``ModelConfig``.

    Raises: UserError that names ``where`` and the key, where a key is missing, of the wrong type, or not supported.
    """
    if data.get("model_type") != "mixtral":
        raise UserError(f"{where}: model_type is {data.get('model_type')!r}; only 'mixtral' models can be compiled")
    if data.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act is {data['hidden_act']!r}; Mixtral's experts use 'silu'")

    def integer(key: str, default: int | None = None) -> int:
        value = data.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is {value!r}; it must be a positive integer")
        return value

    def token_ids(key: str, default: int) -> tuple[int, ...]:
        value = data.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise UserError(f"{where}: {key} is {value!r}; it must be a token id, a list of them or null")
        return tuple(ids)

    heads = integer("num_attention_heads")
    hidden = integer("hidden_size")
    theta, factor = _rope(data, where)
    config = ModelConfig(
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        # as HF has it: 8 where the key is absent, as many as heads where it is null
        num_key_value_heads=integer("num_key_value_heads", heads if "num_key_value_heads" in data else 8),
        head_dim=integer("head_dim", hidden // heads),
        num_local_experts=integer("num_local_experts", 8),
        num_experts_per_tok=integer("num_experts_per_tok", 2),
        max_position_embeddings=integer("max_position_embeddings", 4096 * 32),
        rms_norm_eps=_number(data, "rms_norm_eps", 1e-5, where),
        rope_theta=theta,
        rope_scaling_factor=factor,
        sliding_window=None if data.get("sliding_window") is None else integer("sliding_window"),
        tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
        dtype=data.get("dtype") or data.get("torch_dtype") or "float32",
        bos_token_id=next(iter(token_ids("bos_token_id", 1)), None),
        eos_token_ids=token_ids("eos_token_id", 2),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{where}: {heads} attention heads do not divide over {config.num_key_value_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise UserError(f"{where}: head_dim is {config.head_dim}; rotary embedding needs an even one")
    if config.num_experts_per_tok > config.num_local_experts:
        raise UserError(
            f"{where}: num_experts_per_tok is {config.num_experts_per_tok}, more than the {config.num_local_experts} experts"
        )
    if config.dtype not in DTYPES:
        raise UserError(f"{where}: dtype is {config.dtype!r}; it must be one of {', '.join(DTYPES)}")
    return config


def _number(data: dict[str, Any], key: str, default: float, where: str) -> float:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value!r}; it must be a positive number")
    return float(value)


def _rope(data: dict[str, Any], where: str) -> tuple[float, float]:
    """(theta, linear factor) from either spelling: ``rope_theta`` + ``rope_scaling``, or transformers 5's
    ``rope_parameters``."""
    rope = data.get("rope_parameters") or {}
    scaling = rope or data.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: the RoPE parameters are {scaling!r}; they must be a JSON object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{where}: RoPE scaling of type {kind!r} is not supported; absent or 'linear' is")
    factor = _number(scaling, "factor", 1.0, f"{where}: RoPE scaling") if kind == "linear" else 1.0
    return _number(data | rope, "rope_theta", 1e6, where), factor
