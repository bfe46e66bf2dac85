"""The tensors of a quantized linear layer, as those who publish such checkpoints store them.

Weights are ``[out, in]``. What each layout stores, g being the group size:

``awq`` (AutoAWQ 0.2.9, ``awq/modules/linear/gemm.py``): ``qweight`` int32 ``[in, out / 8]`` and ``qzeros`` int32
``[in / g, out / 8]``, eight output features to a word in AutoAWQ's order; ``scales`` ``[in / g, out]``.

``gptq``, ``gptq_v2`` (GPTQModel 7.7, ``nn_modules/qlinear/__init__.py``): ``qweight`` int32 ``[in / 8, out]``, eight input
features to a word; ``qzeros`` int32 ``[in / g, out / 8]``, in version 1 less one (modulo 16, as AutoGPTQ reads it);
``scales`` ``[in / g, out]``; ``g_idx`` int32 ``[in]``, each input feature's group.

``pack-quantized`` (compressed-tensors 0.20, ``compressors/pack_quantized``): ``weight_packed`` int32 ``[out, in / 8]``, eight
input features to a word; ``weight_scale`` ``[out, in / g]``; where asymmetric, ``weight_zero_point`` int32
``[out / 8, in / g]``; codes and zero points plus 8. Old ones with ordered groups have ``weight_g_idx``.

``float-quantized`` (the same, ``compressors/naive_quantized``): ``weight`` E4M3, ``weight_scale`` ``[1]`` or ``[out, 1]``,
``input_scale`` ``[1]`` where activations have static scales.

``FP8`` (ModelOpt 0.47, ``torch/export/quant_utils.py``): ``weight`` E4M3, ``weight_scale`` and ``input_scale`` float32 ``[]``.

``NVFP4`` (ModelOpt, ``torch/quantization/qtensor/nvfp4_tensor.py``): ``weight`` uint8 ``[out, in / 2]``, two input features to a
byte; ``weight_scale`` E4M3 ``[out, in / 16]``; ``weight_scale_2`` float32 ``[]``, the global scale; ``input_scale``.

``nvfp4-pack-quantized`` (compressed-tensors, ``compressors/nvfp4``): ``weight_packed`` and ``weight_scale`` as those two;
``weight_global_scale`` float32 ``[1]``, by which block scales are divided: its reciprocal is the global scale, and their product
differs from the quotient in a float32's last bit at most; ``input_global_scale`` ``[1]`` where activations were quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moecompiler.errors import UserError
from moecompiler.quantization.encodings import BFLOAT16, E4M3
from moecompiler.quantization.packing import AWQ_ORDER, WORD, less_eight, unpack_bytes, unpack_words
from moecompiler.quantization.published_config import Layout, PublishedConfig
from moecompiler.quantization.schemes import Granularity, QuantizedTensor, WeightScheme
from moecompiler.weights import Shape

Tensors = Mapping[str, np.ndarray]  # by full name; read when asked for

INT32 = np.dtype(np.int32)
FLOATS = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32))
ZERO_POINT = 8  # of symmetric codes that are stored as 0 to 15

_REQUIRED: dict[Layout, tuple[str, ...]] = {
    Layout.AWQ: ("qweight", "qzeros", "scales"),
    Layout.GPTQ_V1: ("qweight", "qzeros", "scales"),
    Layout.GPTQ_V2: ("qweight", "qzeros", "scales"),
    Layout.CT_INT4: ("weight_packed", "weight_scale"),
    Layout.CT_FP8: ("weight", "weight_scale"),
    Layout.MODELOPT_FP8: ("weight", "weight_scale"),
    Layout.MODELOPT_NVFP4: ("weight", "weight_scale", "weight_scale_2"),
    Layout.CT_NVFP4: ("weight_packed", "weight_scale", "weight_global_scale"),
}
_GROUP_OF = {Layout.GPTQ_V1: "g_idx", Layout.GPTQ_V2: "g_idx", Layout.CT_INT4: "weight_g_idx"}


def tensors_of(config: PublishedConfig) -> tuple[str, ...]:
    """The tensors that a quantized linear layer must have."""
    more = []
    if config.layout is Layout.CT_INT4 and not config.scheme.symmetric:
        more.append("weight_zero_point")
    if config.act_order:
        more.append(_GROUP_OF[config.layout])
    if config.activations == "static" and config.layout is not Layout.CT_NVFP4:  # whose are not read
        more.append("input_scale")
    return _REQUIRED[config.layout] + tuple(more)


@dataclass(frozen=True)
class Taker:
    """A layer's tensors, each checked as it is taken."""

    tensors: Tensors
    linear: str
    shape: Shape

    def __call__(self, suffix: str, shape: Shape, dtypes: tuple[np.dtype, ...]) -> np.ndarray:
        name = f"{self.linear}.{suffix}"
        if name not in self.tensors:
            raise UserError(f"{name}: missing; the checkpoint's configuration says that the layer has it")
        array = self.tensors[name]
        if array.shape != shape:
            raise UserError(
                f"{name}: is {list(array.shape)}, expected {list(shape)}; does the configuration belong to it?"
            )
        if array.dtype not in dtypes:
            raise UserError(f"{name}: is {array.dtype}, expected {' or '.join(map(str, dtypes))}")
        return array

    def has(self, suffix: str) -> bool:
        return f"{self.linear}.{suffix}" in self.tensors

    def one(self, suffix: str) -> np.ndarray:
        """A single number, stored as ``[]`` or ``[1]``, as ``[]``."""
        name = f"{self.linear}.{suffix}"
        shape = (1,) if name in self.tensors and self.tensors[name].shape == (1,) else ()
        return self(suffix, shape, FLOATS).reshape(())

    def eighth(self, suffix: str, size: int) -> int:
        if size % WORD:
            raise UserError(f"{self.linear}.{suffix}: {size} features do not fill words of {WORD}")
        return size // WORD


def read_awq(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    out, features = take.shape
    groups = _groups(config.scheme, features)
    columns = take.eighth("qweight", out)
    codes = unpack_words(take("qweight", (features, columns), (INT32,)), AWQ_ORDER)
    zeros = unpack_words(take("qzeros", (groups, columns), (INT32,)), AWQ_ORDER)
    scales = take("scales", (groups, out), FLOATS)
    return QuantizedTensor(
        config.scheme, _transposed(codes), _per_row(scales.T, config.scheme), _per_row(zeros.T, config.scheme)
    )


def read_gptq(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    out, features = take.shape
    scheme, groups = config.scheme, _groups(config.scheme, features)
    words = take("qweight", (take.eighth("qweight", features), out), (INT32,))
    zeros = unpack_words(take("qzeros", (groups, take.eighth("qzeros", out)), (INT32,)))
    if config.layout is Layout.GPTQ_V1:
        zeros = (zeros + np.uint8(1)) & np.uint8(0x0F)
    scales = _per_row(take("scales", (groups, out), FLOATS).T, scheme)
    order = _order(config, take, groups)
    codes = unpack_words(_transposed(words))
    codes = codes if order is None else codes[:, order]
    if not scheme.symmetric:
        return QuantizedTensor(scheme, codes, scales, _per_row(zeros.T, scheme), order=order)
    if (zeros != ZERO_POINT).any():
        raise UserError(f"{take.linear}.qzeros: are not all {ZERO_POINT}, but the configuration says that sym is true")
    return QuantizedTensor(scheme, less_eight(codes), scales, order=order)


def read_packed(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    out, features = take.shape
    scheme, groups = config.scheme, _groups(config.scheme, features)
    codes = unpack_words(take("weight_packed", (out, take.eighth("weight_packed", features)), (INT32,)))
    scales = _per_row(take("weight_scale", (out, groups), FLOATS), scheme)
    order = _order(config, take, groups)
    codes = codes if order is None else codes[:, order]
    if scheme.symmetric:
        return QuantizedTensor(scheme, less_eight(codes), scales, order=order)
    words = take("weight_zero_point", (take.eighth("weight_zero_point", out), groups), (INT32,))
    return QuantizedTensor(scheme, codes, scales, _per_row(unpack_words(_transposed(words)).T, scheme), order=order)


def read_fp8(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    codes = take("weight", take.shape, (E4M3,))
    if config.scheme.granularity is Granularity.TENSOR:
        return QuantizedTensor(config.scheme, codes, take.one("weight_scale"))
    return QuantizedTensor(config.scheme, codes, take("weight_scale", (take.shape[0], 1), FLOATS)[:, 0])


def read_nvfp4(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    global_scale = take.one("weight_scale_2").astype(np.float32)
    return _read_nvfp4(config, take, "weight", global_scale)


def read_packed_nvfp4(config: PublishedConfig, take: Taker) -> QuantizedTensor:
    divisor = take.one("weight_global_scale").astype(np.float32)
    with np.errstate(divide="ignore"):
        return _read_nvfp4(config, take, "weight_packed", np.float32(1) / divisor)


def _read_nvfp4(config: PublishedConfig, take: Taker, suffix: str, global_scale: np.ndarray) -> QuantizedTensor:
    out, features = take.shape
    codes = unpack_bytes(take(suffix, (out, features // 2), (np.dtype(np.uint8),)))
    scales = take("weight_scale", (out, _groups(config.scheme, features)), (E4M3,))
    return QuantizedTensor(config.scheme, codes, scales, global_scale=np.asarray(global_scale))


READERS: dict[Layout, Callable[[PublishedConfig, Taker], QuantizedTensor]] = {
    Layout.AWQ: read_awq,
    Layout.GPTQ_V1: read_gptq,
    Layout.GPTQ_V2: read_gptq,
    Layout.CT_INT4: read_packed,
    Layout.CT_FP8: read_fp8,
    Layout.MODELOPT_FP8: read_fp8,
    Layout.MODELOPT_NVFP4: read_nvfp4,
    Layout.CT_NVFP4: read_packed_nvfp4,
}


def _groups(scheme: WeightScheme, features: int) -> int:
    return features // (scheme.block_size or features)


def _transposed(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix.T)


def _per_row(values: np.ndarray, scheme: WeightScheme) -> np.ndarray:
    """``[out, groups]`` in the shape that the scheme's scales have."""
    return np.ascontiguousarray(values[:, 0] if scheme.block_size is None else values)


def _order(config: PublishedConfig, take: Taker, groups: int) -> np.ndarray | None:
    """The input features, group after group; ``None`` where the configuration says that they lie so.

    Raises: UserError where the groups are not of one size, or in an order that the configuration does not speak of.
    """
    suffix = _GROUP_OF[config.layout]
    if not config.act_order and not take.has(suffix):
        return None
    group_of = take(suffix, take.shape[1:], (INT32, np.dtype(np.int64)))
    size = take.shape[1] // groups
    if not config.act_order:
        if not np.array_equal(group_of, np.arange(len(group_of)) // size):
            raise UserError(
                f"{take.linear}.{suffix}: puts features in another order, but the configuration says that none are"
            )
        return None
    order = np.argsort(group_of, kind="stable")
    if not np.array_equal(group_of[order], np.arange(len(order)) // size):
        raise UserError(f"{take.linear}.{suffix}: does not put {size} features into each of {groups} groups")
    return order
