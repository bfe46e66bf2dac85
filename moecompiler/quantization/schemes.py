"""How a weight is quantized: the format of its codes, and which of them share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from moecompiler.errors import UserError
from moecompiler.quantization.encodings import E2M1_MAX, E4M3, E4M3_MAX

if TYPE_CHECKING:
    from moecompiler.weights import Shape  # which knows schemes

NVFP4_BLOCK = 16


class Format(StrEnum):
    """What a code is; named as ONNX's and numpy's dtypes. ``UINT4`` codes have a zero point, the others are symmetric."""

    INT8 = "int8"
    INT4 = "int4"
    UINT4 = "uint4"
    E4M3 = "float8_e4m3fn"
    E2M1 = "float4_e2m1fn"

    @property
    def bits(self) -> int:
        return 8 if self in (Format.INT8, Format.E4M3) else 4

    @property
    def dtype(self) -> np.dtype:
        """The numpy dtype of an array with one code to an element; 4-bit codes have a byte each until they are packed."""
        if self is Format.E4M3:
            return E4M3
        return np.dtype(np.int8 if self in (Format.INT8, Format.INT4) else np.uint8)

    @property
    def range(self) -> tuple[int, int]:
        """The lowest and the highest integer. Raises: KeyError for floating-point formats."""
        return {Format.INT8: (-128, 127), Format.INT4: (-8, 7), Format.UINT4: (0, 15)}[self]

    @property
    def largest(self) -> float:
        """What a scale is measured by: the largest magnitude that both signs have; for ``UINT4``, of the whole range."""
        return {Format.E4M3: E4M3_MAX, Format.E2M1: E2M1_MAX}.get(self) or float(self.range[1])


class Granularity(StrEnum):
    """Who shares a scale, in a weight ``[..., out, in]``: each matrix, each output row, or ``block_size`` neighbours in a row."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"


@dataclass(frozen=True)
class WeightScheme:
    """A format and its granularity. ``block_size`` counts input features, and is given for blocks only. ``act_order``: a block's
    features are not neighbours (see ``QuantizedTensor.order``); nothing is quantized so here, but published checkpoints are."""

    format: Format
    granularity: Granularity
    block_size: int | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        if (self.block_size is not None) != (self.granularity is Granularity.BLOCK):
            raise ValueError(f"{self.granularity} with block size {self.block_size}")
        if self.format is Format.E2M1 and self.block_size != NVFP4_BLOCK:
            raise ValueError(f"NVFP4 has blocks of {NVFP4_BLOCK}, not {self.block_size}")

    @property
    def symmetric(self) -> bool:
        return self.format is not Format.UINT4

    @property
    def two_level(self) -> bool:
        """NVFP4: block scales are E4M3 themselves, and a float32 scale of the whole matrix multiplies them."""
        return self.format is Format.E2M1

    def scale_shape(self, shape: Shape, where: str = "weight") -> Shape:
        """The shape of the scales of a weight of ``shape`` ``[..., out, in]``: ``[...]`` (tensor), ``[..., out]`` (channel) or
        ``[..., out, in / block_size]``. These are the shapes that ONNX's DequantizeLinear (opset 21) takes, with ``axis`` 0 for
        ``[experts, out, in]`` and ``[experts]``, and with ``axis`` -1 and ``block_size`` for blocks.

        Raises: UserError that begins with ``where``, where the blocks do not fill the rows.
        """
        if self.granularity is Granularity.TENSOR:
            return shape[:-2]
        if self.block_size is None:
            return shape[:-1]
        if shape[-1] % self.block_size:
            raise UserError(
                f"{where}: groups of {self.block_size} do not divide its {shape[-1]} input features; give a group size that does"
            )
        return (*shape[:-1], shape[-1] // self.block_size)

    def __str__(self) -> str:
        block = f" {self.block_size}" if self.block_size else ""
        return f"{self.format} per {self.granularity}{block}{' in act-order' if self.act_order else ''}"


INT8 = WeightScheme(Format.INT8, Granularity.CHANNEL)
FP8 = WeightScheme(Format.E4M3, Granularity.TENSOR)
NVFP4 = WeightScheme(Format.E2M1, Granularity.BLOCK, NVFP4_BLOCK)


def int4(block_size: int | None, *, symmetric: bool = True) -> WeightScheme:
    """Blocks of ``block_size`` input features, with zero points unless ``symmetric``; ``None``: a whole row is one block."""
    format_ = Format.INT4 if symmetric else Format.UINT4
    return WeightScheme(format_, Granularity.CHANNEL if block_size is None else Granularity.BLOCK, block_size)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight ``[..., out, in]`` in codes, and what they stand for: ``(codes - zero_points) * scales``.

    ``codes`` ``[..., out, in]``, of the format's dtype; ``scales`` of the scheme's ``scale_shape``, float16, bfloat16 or float32,
    for NVFP4 ``float8_e4m3fn``; ``zero_points`` uint8 as ``scales``, for asymmetric schemes alone; ``global_scale`` float32, for
    NVFP4 alone, ``[...]`` or, where matrices with several were joined, ``[..., out]``. ``order`` ``[..., in]`` int64, for GPTQ's
    act-order: column j of ``codes`` is input feature ``order[j]``, so that a block's features, wherever in the input they are,
    stand side by side.
    """

    scheme: WeightScheme
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    global_scale: np.ndarray | None = None
    order: np.ndarray | None = None

    @property
    def shape(self) -> Shape:
        return self.codes.shape
