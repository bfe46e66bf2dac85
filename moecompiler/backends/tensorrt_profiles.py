"""The shapes an engine is tuned for: one optimization profile for prefill, one for decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from moecompiler.backends.base import EngineLimits
from moecompiler.errors import UserError
from moecompiler.weights import Shape

MAX_NUM_TOKENS = 8192  # of a step, where nobody says; TensorRT-LLM's default
PREFILL, DECODE = 0, 1  # indices of the profiles


@dataclass(frozen=True)
class Range:
    """The least, the typical and the largest size of a dimension, or shape of an input."""

    least: int
    typical: int
    largest: int


def prefill_rows(limits: EngineLimits) -> int:
    """How many sequences are prefilled at once, so that a step has at most ``max_num_tokens``."""
    tokens = limits.max_num_tokens or max(MAX_NUM_TOKENS, limits.max_input_len)
    return max(1, min(limits.max_batch_size, tokens // limits.max_input_len))


def ranges(limits: EngineLimits) -> tuple[dict[str, Range], dict[str, Range]]:
    """What ``batch`` and ``sequence`` range over in prefill and in decode. Half the longest prompt is a typical one; a decode
    step is tuned for the largest batch."""
    rows, batch, length = prefill_rows(limits), limits.max_batch_size, limits.max_input_len
    prefill = {"batch": Range(1, rows, rows), "sequence": Range(1, (length + 1) // 2, length)}
    decode = {"batch": Range(1, batch, batch), "sequence": Range(1, 1, 1)}
    return prefill, decode


def profiles(
    inputs: Sequence[onnx.ValueInfoProto], limits: EngineLimits
) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
    """For each profile the least, typical and largest shape of every input that has a dimension to choose.

    Raises: UserError where such a dimension is neither ``batch`` nor ``sequence``.
    """
    return [_profile(inputs, each) for each in ranges(limits)]


def _profile(
    inputs: Sequence[onnx.ValueInfoProto], sizes: Mapping[str, Range]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    result = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        symbols = [dim.dim_param for dim in dims if not dim.HasField("dim_value")]
        if unknown := [symbol or "an unnamed one" for symbol in symbols if symbol not in sizes]:
            raise UserError(
                f"input {value.name} has the dimension {unknown[0]}: backend tensorrt builds graphs whose free dimensions are"
                " batch and sequence, as `export` makes them"
            )
        if symbols:
            every = [
                sizes[dim.dim_param] if not dim.HasField("dim_value") else Range(*[dim.dim_value] * 3) for dim in dims
            ]
            shapes = tuple(tuple(getattr(each, bound) for each in every) for bound in ("least", "typical", "largest"))
            result[value.name] = shapes
    return result  # type: ignore[return-value]


def buckets(max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes a decode step is captured for: powers of two, and the largest."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return (*sizes, max_batch_size) if max_batch_size > 1 else (1,)


def bucket_of(batch: int, max_batch_size: int) -> int:
    """The smallest bucket that holds ``batch`` sequences."""
    return next(size for size in buckets(max_batch_size) if size >= batch)
