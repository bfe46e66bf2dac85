"""Ranks' shares of quantized weights, and weights put together, without quantizing anything anew.

A share of a quantized weight stands for exactly that share of the numbers that the whole stands for: a rank computes with what
one rank alone would. Quantizing the share itself gives the same codes and scales

- along ``out``, for scales per channel or block;
- along ``in``, for scales per block, if the share is of whole blocks (another cut is an error);
- by experts, always;

and other ones where more than the share has a say in a scale: along ``in`` per channel, along either axis per tensor and for
NVFP4, whose global scale is per tensor. There the share's own scales would depend on the number of ranks: a little finer for
integers, no better for floating-point codes, whose precision is relative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum

import numpy as np

from moecompiler.errors import UserError
from moecompiler.quantization.schemes import Granularity, QuantizedTensor, WeightScheme

Change = Callable[[np.ndarray], np.ndarray]


class Axis(StrEnum):
    """Which features of a weight ``[..., out, in]``."""

    OUT = "out"
    IN = "in"


def share(tensor: QuantizedTensor, axis: Axis, rank: int, parts: int, where: str) -> QuantizedTensor:
    """Part ``rank`` of ``parts`` equal ones along ``axis``. Raises: UserError that begins with ``where``, as ``cut``, and where
    the features do not divide."""
    size = tensor.shape[-2 if axis is Axis.OUT else -1]
    if size % parts:
        raise UserError(f"{where}: its {size} {axis}put features do not divide over {parts} ranks")
    each = size // parts
    return cut(tensor, axis, rank * each, (rank + 1) * each, where)


def cut(tensor: QuantizedTensor, axis: Axis, start: int, stop: int, where: str) -> QuantizedTensor:
    """Features ``start`` to ``stop`` along ``axis``; scales that others share too are kept.

    Raises: UserError that begins with ``where``, where a cut along ``in`` goes through a block, or features are in another
    order than they have (GPTQ's act-order).
    """
    granularity, block = tensor.scheme.granularity, tensor.scheme.block_size
    if axis is Axis.OUT:
        rows = slice(start, stop)
        by_row = {
            Granularity.TENSOR: _same,
            Granularity.CHANNEL: lambda scales: scales[..., rows],
            Granularity.BLOCK: lambda scales: scales[..., rows, :],
        }
        return _changed(tensor, lambda codes: codes[..., rows, :], by_row[granularity], _same)
    if tensor.order is not None:
        raise UserError(f"{where}: quantized with act-order, whose groups cannot be split over ranks; use --tp_size 1")
    if block is None:
        return _changed(tensor, lambda codes: codes[..., start:stop], _same, _same)
    if start % block or stop % block:
        raise UserError(
            f"{where}: input features {start} to {stop} are no whole groups of {block}; use fewer tensor-parallel ranks, or"
            f" a group size that divides {stop - start}"
        )
    blocks = slice(start // block, stop // block)
    return _changed(tensor, lambda codes: codes[..., start:stop], lambda scales: scales[..., blocks], _same)


def experts(tensor: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Matrices ``start`` to ``stop`` of a weight ``[experts, out, in]``."""

    def some(values: np.ndarray) -> np.ndarray:
        return values[start:stop]

    return _changed(tensor, some, some, some)


def stacked(tensors: Sequence[QuantizedTensor], where: str) -> QuantizedTensor:
    """Weights ``[out, in]`` as one ``[experts, out, in]``.

    Raises: UserError that begins with ``where``, where they differ in scheme, or in whether input features are in another
    order; ValueError where they differ in shape.
    """
    _check_alike(tensors, where)
    return _combined(tensors, np.stack, np.stack, np.stack)


def joined(tensors: Sequence[QuantizedTensor], where: str) -> QuantizedTensor:
    """Weights ``[..., out, in]`` of the same input one below the other, along ``out``: queries, keys and values, or gate and up.

    Where scales are per tensor they become scales per channel, and the numbers stay.

    Raises: UserError that begins with ``where``, where they differ in scheme, in the order of input features, or, for NVFP4, in
    the global scale (ModelOpt gives weights that belong together the same).
    """
    _check_alike(tensors, where)
    for name, values in (("global scales", "global_scale"), ("orders of input features", "order")):
        first = getattr(tensors[0], values)
        if any(not np.array_equal(getattr(tensor, values), first) for tensor in tensors if first is not None):
            raise UserError(f"{where}: the weights that are joined have different {name}, and cannot be")
    tensors = [_per_channel(tensor) for tensor in tensors]
    rows = -1 if tensors[0].scheme.granularity is Granularity.CHANNEL else -2
    return _combined(
        tensors,
        lambda arrays: np.concatenate(arrays, -2),
        lambda arrays: np.concatenate(arrays, rows),
        lambda arrays: arrays[0],
    )


def _per_channel(tensor: QuantizedTensor) -> QuantizedTensor:
    """Its scales per channel if they are per tensor."""
    if tensor.scheme.granularity is not Granularity.TENSOR:
        return tensor
    scales = np.repeat(tensor.scales[..., None], tensor.shape[-2], axis=-1)
    return replace(tensor, scheme=WeightScheme(tensor.scheme.format, Granularity.CHANNEL), scales=scales)


def _check_alike(tensors: Sequence[QuantizedTensor], where: str) -> None:
    kinds = {f"{tensor.scheme}{' with act-order' if tensor.order is not None else ''}" for tensor in tensors}
    if len(kinds) != 1:
        raise UserError(f"{where}: mixed formats: {', '.join(sorted(kinds))}; they must be quantized alike")


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _changed(tensor: QuantizedTensor, codes: Change, scales: Change, matrices: Change) -> QuantizedTensor:
    """``scales`` is for what is shaped as scales are, ``matrices`` for what each matrix has one of."""
    return _combined([tensor], lambda a: codes(a[0]), lambda a: scales(a[0]), lambda a: matrices(a[0]))


def _combined(
    tensors: Sequence[QuantizedTensor],
    codes: Callable[[list[np.ndarray]], np.ndarray],
    scales: Callable[[list[np.ndarray]], np.ndarray],
    matrices: Callable[[list[np.ndarray]], np.ndarray],
) -> QuantizedTensor:
    def of(field: str, combine: Callable[[list[np.ndarray]], np.ndarray]) -> np.ndarray | None:
        arrays = [getattr(tensor, field) for tensor in tensors]
        return None if arrays[0] is None else combine(arrays)

    return QuantizedTensor(
        tensors[0].scheme,
        codes([tensor.codes for tensor in tensors]),
        scales([tensor.scales for tensor in tensors]),
        of("zero_points", scales),
        of("global_scale", matrices),
        of("order", matrices),
    )
