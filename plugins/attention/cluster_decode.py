"""Decode on SM 9.0: ``decode.cu``'s kernel and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass

from moecompiler.plugins.launch import CudaKernel, power_of_two, shared_memory

LARGEST_GROUP = 16  # query heads of a key-value head
_WARPS, _MAX_STAGES = 4, 12

SIGNATURE = (
    *((name, "*i16") for name in ("query", "key", "value", "cos", "sin")),
    ("positions", "*i64"),
    *((name, "tensormap") for name in ("keys", "values")),
    *((name, "*i16") for name in ("key_cache", "value_cache", "output")),
    ("slots", "i32"),
    ("scale", "fp32"),
)
SCALES = tuple((name, "*i16") for name in ("key_scales", "value_scales"))  # behind these, of a cache of codes


def tile_slots(codes: int) -> int:
    """How many slots the copy engine fetches at a time, 4 kB of keys of 128 columns; ``codes`` as in ``cache_codes``."""
    return 32 if codes else 16


def row_columns(codes: int) -> int:
    """Columns of 128 bytes."""
    return 128 if codes else 64


@dataclass(frozen=True)
class ClusterDecode:
    """A cluster of programs per sequence and key-value head, among which the slots are divided: until ``busy`` of the
    multiprocessors have a program, if a program's warps then still have two tiles each. Two programs fit into a
    multiprocessor; 8 in a cluster is what every card can place."""

    busy: float = 0.75
    max_parts: int = 8

    def parts(self, clusters: int, slots: int, processors: int, tile: int) -> int:
        """A power of two; ``tile``: slots of one."""
        wanted = power_of_two(-(-int(self.busy * processors) // clusters))
        worthwhile = max(1, slots // (2 * _WARPS * tile))
        return min(wanted, self.max_parts, 1 << (worthwhile.bit_length() - 1))


def macros(heads: int, kv_heads: int, head_dim: int, window: int, dtype: str) -> dict[str, int]:
    """What attention's CUDA C++ is compiled for."""
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "ELEMENT_IS_BFLOAT16": dtype == "bfloat16",
    }


def cluster_decode_kernel(
    heads: int, kv_heads: int, head_dim: int, window: int, dtype: str, codes: int = 0
) -> CudaKernel:
    """For up to ``LARGEST_GROUP`` query heads of a key-value head, and head sizes up to 128 that are multiples of 8, of codes
    of 16; ``dtype`` is ``float16`` or ``bfloat16``. Rings are as long as two programs in a multiprocessor leave room for."""
    group = heads // kv_heads
    rows, steps = (8 if group <= 8 else 16), -(-head_dim // 16)
    blocks = -(-group * head_dim // 8 // 8) * 8
    barriers, sums, mixed = 8 * (_WARPS * _MAX_STAGES + 1), 8 * _WARPS * 8 * group, 4 * _WARPS * 8 * blocks
    query, new, alignment = rows * (32 * steps + 16), 512, 256
    before_rings = -(-(barriers + sums + mixed + query + new + alignment) // 1024) * 1024 + 1024
    stage = _WARPS * tile_slots(codes) * 128 * -(-head_dim // row_columns(codes))
    room = (shared_memory(90) + 1024) // 2 - 1024
    stages = min(_MAX_STAGES, (room - before_rings) // stage)
    shared = before_rings + stages * stage
    constants = macros(heads, kv_heads, head_dim, window, dtype) | {"CODES": codes, "STAGES": stages, "SHARED": shared}
    signature = (*SIGNATURE, *SCALES) if codes else SIGNATURE
    source = "moecompiler.plugins.attention/decode.cu"
    return CudaKernel(source, "decode", signature, tuple(constants.items()), _WARPS, shared)
