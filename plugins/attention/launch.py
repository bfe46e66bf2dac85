"""Plans of ``Attention``: decode for one new token per sequence, prefill for more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moecompiler.plugins.attention.cluster_decode import (
    LARGEST_GROUP,
    ClusterDecode,
    cluster_decode_kernel,
    macros,
    row_columns,
    tile_slots,
)
from moecompiler.plugins.launch import (
    TRITON_TYPES,
    AnyKernel,
    Arena,
    Argument,
    CudaKernel,
    Dims,
    Input,
    Kernel,
    Launch,
    Output,
    TensorMap,
    Workspace,
    multiprocessors,
    power_of_two,
    shared_memory,
)

_MODULE = "moecompiler.plugins.attention.kernels"
_APPENDED_TOKENS = 16  # per program
_CODES = {"AttentionInt8Cache": 1, "AttentionFp8Cache": 2, "AttentionFp8Context": 2}  # see ``cache_codes``
_WIDENED_SLOTS = 64  # per program
_STEP_SLOTS = 128  # of prefill.cu, which reads whole steps
_DECODE, _APPEND, _PREFILL, _MERGE = range(4)  # of a tactic's kernels; the last is `_WIDEN` if it has one
_QUERY, _KEY, _VALUE, _COS, _SIN, _POSITIONS, _PAST_KEY = (Input(i) for i in range(7))
_KEY_SCALES, _VALUE_SCALES = Input(8), Input(9)
_OUTPUT, _KEYS, _VALUES = (Output(i) for i in range(3))


@dataclass(frozen=True)
class DecodeTiles:
    """``slots`` of the cache at a time; slots are divided until there are ``programs`` per multiprocessor."""

    slots: int = 64
    stages: int = 3
    warps: int = 4
    programs: int = 2
    max_parts: int = 32


@dataclass(frozen=True)
class PrefillTiles:
    """``tokens`` per program, ``slots`` of the cache at a time."""

    tokens: int = 64
    slots: int = 64
    stages: int = 3
    warps: int = 4


@dataclass(frozen=True)
class WarpgroupPrefill:
    """SM 9.0's: warps with roles, ``tokens`` of a head at a time; the copy engine fetches ``slots`` of the cache."""

    tokens: int = 128
    slots: int = 128


@dataclass(frozen=True)
class AttentionTactic:
    """The cache is read and written through the outputs: they are aliased to the inputs ``past_key`` and ``past_value``.
    ``processors``: the card's multiprocessors, which decide into how many parts decode divides the cache. ``codes``: what the
    cache holds (``cache_codes``); ``context``: prefill multiplies numbers of E4M3."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    dtype: str
    sm: int
    decode: DecodeTiles | ClusterDecode
    prefill: PrefillTiles | WarpgroupPrefill
    processors: int
    codes: int = 0
    context: bool = False

    @cached_property
    def kernels(self) -> tuple[AnyKernel, ...]:
        heads = {"KV": self.kv_heads, "D": self.head_dim, "D_BLOCK": self._block}
        types = f"key:T value:T cos:T sin:T position_ids:L keys:C values:C length:i32 slots:i32{self._scale_types}"
        append = self._kernel("append", types, heads | {"S_BLOCK": _APPENDED_TOKENS} | self._held, 4)
        prefill = (
            self._warpgroup_prefill()
            if isinstance(self.prefill, WarpgroupPrefill)
            else self._tiled_prefill(self.prefill)
        )
        if isinstance(self.decode, ClusterDecode):
            sizes = (self.heads, self.kv_heads, self.head_dim, self.window, self.dtype)
            cluster = cluster_decode_kernel(*sizes, self.codes)
            return (cluster, append, prefill, *((self._widen(),) if self._widens else ()))
        constants = {"D": self.head_dim, "D_BLOCK": self._block, "P_BLOCK": self.decode.max_parts}
        merge = self._kernel("merge", "mixed:F sums:F output:T parts:i32", constants, 4)
        tiled = self._tiled_decode(self.decode), append, prefill, merge
        return (*tiled, self._widen()) if self._widens else tiled

    def _tiled_decode(self, tiles: DecodeTiles) -> Kernel:
        constants = (
            self._sizes
            | self._held
            | {
                "G_BLOCK": max(16, power_of_two(self.heads // self.kv_heads)),
                "T_BLOCK": tiles.slots,
            }
        )
        stages = self._stages(tiles.stages, 4 * self._block * tiles.slots)
        inputs = "query:T key:T value:T cos:T sin:T position_ids:L keys:C values:C"
        types = f"{inputs} output:T mixed:F sums:F slots:i32 scale:fp32 parts:i32{self._scale_types}"
        return self._kernel("decode", types, constants, tiles.warps, stages)

    def _tiled_prefill(self, tiles: PrefillTiles) -> Kernel:
        constants = (
            self._sizes | self._held | {"S_BLOCK": tiles.tokens, "T_BLOCK": tiles.slots, "CONTEXT": self.context}
        )
        stages = self._stages(tiles.stages, 4 * self._block * tiles.slots, 2 * self._block * tiles.tokens)
        tensors = "query:T cos:T sin:T position_ids:L keys:C values:C output:T"
        types = f"{tensors} length:i32 slots:i32 scale:fp32 cache_rows:i32{self._scale_types}"
        return self._kernel("prefill", types, constants, tiles.warps, stages)

    def _widen(self) -> Kernel:
        sizes = {"KV": self.kv_heads, "D": self.head_dim, "D_BLOCK": self._block, "T_BLOCK": _WIDENED_SLOTS}
        sizes["STEP"] = _STEP_SLOTS
        types = "keys:C values:C position_ids:L wide_keys:T wide_values:T length:i32 slots:i32"
        return self._kernel("widen", f"{types}{self._scale_types}", sizes | self._held, 4)

    def _warpgroup_prefill(self) -> CudaKernel:
        constants = macros(self.heads, self.kv_heads, self.head_dim, self.window, self.dtype)
        pointers = (("query", "*i16"), ("cos", "*i16"), ("sin", "*i16"), ("positions", "*i64"))
        maps = (("keys", "tensormap"), ("values", "tensormap"))
        numbers = (("batch", "i32"), ("length", "i32"), ("slots", "i32"), ("scale", "fp32"))
        signature = (*pointers, *maps, ("output", "*i16"), *numbers)
        block = 2 * 128 * (64 if self.head_dim <= 64 else 128)
        return CudaKernel(
            "moecompiler.plugins.attention/prefill.cu",
            "prefill",
            signature,
            tuple(constants.items()),
            12,
            6 * block + 4096,
        )

    def workspace(self, dims: Dims) -> int:
        if dims[0][1] != 1 and self._widens:
            return self._wide_cache(dims)[2]
        if isinstance(self.decode, ClusterDecode):
            return 0
        arena, (batch, _, _), slots = Arena(), dims[0], dims[6][2]
        # fewer sequences may be divided into more parts, so what the plan for `batch` takes is not the bound
        counts = range(1, max(1, batch) + 1)
        rows = self.heads * max(count * self._parts(self.decode, count, slots) for count in counts)
        arena.take(4 * rows * self.head_dim)
        arena.take(8 * rows)
        return arena.size

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        (batch, length, _), slots = dims[0], dims[6][2]
        if not batch or not length:
            return ()
        scale = self.scale * math.log2(math.e)
        if length == 1:
            if isinstance(self.decode, ClusterDecode):
                return (self._cluster_launch(self.decode, batch, slots, scale),)
            return self._tiled_launches(self.decode, batch, slots, scale)
        append: tuple[Argument, ...] = (
            _KEY,
            _VALUE,
            _COS,
            _SIN,
            _POSITIONS,
            _KEYS,
            _VALUES,
            length,
            slots,
            *self._scales,
        )
        first = Launch(_APPEND, (-(-length // _APPENDED_TOKENS), self.kv_heads, batch), append)
        if not self._widens:
            return first, self._attend_launch(batch, length, slots, scale, (_KEYS, _VALUES))
        keys, values, _ = self._wide_cache(dims)
        args: tuple[Argument, ...] = (_KEYS, _VALUES, _POSITIONS, keys, values, length, slots, *self._scales)
        grid = (-(-slots // _WIDENED_SLOTS), self.kv_heads, batch)
        widen = Launch(len(self.kernels) - 1, grid, args, self._overlapped)
        return first, widen, self._attend_launch(batch, length, slots, scale, (keys, values))

    def _wide_cache(self, dims: Dims) -> tuple[Workspace, Workspace, int]:
        """Where prefill's keys and values are as numbers, and the bytes of both."""
        arena, count = Arena(), math.prod(dims[6])
        return arena.take(2 * count), arena.take(2 * count), arena.size

    def _cluster_launch(self, decode: ClusterDecode, batch: int, slots: int, scale: float) -> Launch:
        tile = tile_slots(self.codes)
        parts = decode.parts(batch * self.kv_heads, slots, self.processors, tile)
        new = (_QUERY, _KEY, _VALUE, _COS, _SIN, _POSITIONS)
        dtype, columns = "int8" if self.codes else self.dtype, row_columns(self.codes)
        maps = self._cache_maps(batch, slots, (_KEYS, _VALUES), dtype, (1, tile, columns))
        args: tuple[Argument, ...] = (*new, *maps, _KEYS, _VALUES, _OUTPUT, slots, scale, *self._scales)
        return Launch(_DECODE, (parts, self.kv_heads, batch), args, cluster=parts)

    def _tiled_launches(self, decode: DecodeTiles, batch: int, slots: int, scale: float) -> tuple[Launch, ...]:
        parts, arena = self._parts(decode, batch, slots), Arena()
        rows = batch * self.heads * parts
        mixed, sums = arena.take(4 * rows * self.head_dim), arena.take(8 * rows)
        inputs = (_QUERY, _KEY, _VALUE, _COS, _SIN, _POSITIONS, _KEYS, _VALUES)
        args: tuple[Argument, ...] = (*inputs, _OUTPUT, mixed, sums, slots, scale, parts, *self._scales)
        attend = Launch(_DECODE, (parts, self.kv_heads, batch), args)
        if parts == 1:
            return (attend,)
        return attend, Launch(_MERGE, (batch * self.heads, 1, 1), (mixed, sums, _OUTPUT, parts), self._overlapped)

    def _attend_launch(
        self, batch: int, length: int, slots: int, scale: float, cache: tuple[Output | Workspace, Output | Workspace]
    ) -> Launch:
        tiles = -(-length // self.prefill.tokens)
        if isinstance(self.prefill, PrefillTiles):
            rows = batch * self.kv_heads * slots
            tiled: tuple[Argument, ...] = (
                _QUERY,
                _COS,
                _SIN,
                _POSITIONS,
                _KEYS,
                _VALUES,
                _OUTPUT,
                length,
                slots,
                scale,
                rows,
            )
            tiled = (*tiled, *self._scales)
            return Launch(_PREFILL, (self.heads, tiles, batch), tiled, self._overlapped)
        keys, values = self._cache_maps(batch, slots, cache, self.dtype, (1, self.prefill.slots, 64))
        programs = min(self.processors, batch * self.heads * tiles)
        args = (_QUERY, _COS, _SIN, _POSITIONS, keys, values, _OUTPUT, batch, length, slots, scale)
        return Launch(_PREFILL, (programs, 1, 1), args, self._overlapped, persistent=True)

    def _cache_maps(
        self, batch: int, slots: int, cache: tuple[Output | Workspace, ...], dtype: str, box: tuple[int, int, int]
    ) -> tuple[TensorMap, ...]:
        """Keys and values, a ``box`` of heads, slots and columns at a time."""
        sizes, strides = (batch * self.kv_heads, slots, self.head_dim), (slots * self.head_dim, self.head_dim)
        return tuple(TensorMap(each, dtype, sizes, strides, box) for each in cache)

    @property
    def _widens(self) -> bool:
        """Whether prefill reads a copy of the cache as numbers: a layer's, which is there only meanwhile."""
        return self.codes > 0 and isinstance(self.prefill, WarpgroupPrefill)

    @property
    def _sizes(self) -> dict[str, int]:
        sizes = {"N": self.heads, "KV": self.kv_heads, "D": self.head_dim, "D_BLOCK": self._block}
        return sizes | {"WINDOW": self.window}

    @property
    def _scales(self) -> tuple[Argument, ...]:
        return (_KEY_SCALES, _VALUE_SCALES) if self.codes else ()

    @property
    def _scale_types(self) -> str:
        return " key_scales:T value_scales:T" if self.codes else ""

    @property
    def _held(self) -> dict[str, Any]:
        """How kernels read the cache: with the GPU's own FP8 where it knows the type."""
        scales: dict[str, Any] = {} if self.codes else {"key_scales": None, "value_scales": None}
        return {"CODES": self.codes, "FAST": self.sm >= 80, "NATIVE": self.codes == 2 and self.sm >= 89} | scales

    @property
    def _overlapped(self) -> bool:
        return self.sm >= 90

    @property
    def _block(self) -> int:
        return max(16, power_of_two(self.head_dim))

    def _parts(self, tiles: DecodeTiles, batch: int, slots: int) -> int:
        """Among how many programs a sequence's slots are divided: each should have two tiles of them."""
        wanted = tiles.programs * self.processors // (batch * self.kv_heads)
        return max(1, min(tiles.max_parts, wanted, slots // (2 * tiles.slots)))

    def _stages(self, wanted: int, stage: int, kept: int = 0) -> int:
        return max(1, min(wanted, (shared_memory(self.sm) - kept - 8192) // stage))

    def _kernel(self, function: str, types: str, constants: Mapping[str, Any], warps: int, stages: int = 1) -> Kernel:
        """``types`` lists arguments as ``name:type``, ``T`` standing for a pointer to the node's own type and
        ``C`` for one to what the cache holds."""
        named = (item.split(":", 1) for item in types.split())
        own = f"*{TRITON_TYPES[self.dtype]}:16"
        kinds = {"T": own, "C": "*i8:16" if self.codes else own, "F": "*fp32:16", "L": "*i64:16"}
        signature = tuple((name, kinds.get(kind, kind)) for name, kind in named)
        all_constants = (*constants.items(), ("OVERLAPPED", self._overlapped))
        return Kernel(_MODULE, function, signature, all_constants, warps, stages)


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[AttentionTactic, ...]:
    """Of ``dims`` only the cache's head size has to be known. None for float32 and for head sizes over 256 or no multiple
    of 16 bytes of the cache, which the copy engine needs."""
    head_dim, codes = dims[6][3], _CODES.get(op, 0)
    if dtype not in ("float16", "bfloat16") or head_dim % (16 if codes else 8) or head_dim > 256:
        return ()
    heads, kv_heads = attributes["num_heads"], attributes["num_kv_heads"]
    scale, window = attributes["scale"], attributes["window"]
    sizes = (heads, kv_heads, head_dim, scale, window, dtype, sm)
    held = (codes, op == "AttentionFp8Context")
    tiled = AttentionTactic("tiled", *sizes, DecodeTiles(), PrefillTiles(), multiprocessors(sm), *held)
    if sm != 90 or head_dim > 128:
        return (tiled,)
    decode = ClusterDecode() if heads // kv_heads <= LARGEST_GROUP else tiled.decode
    whole = head_dim % 16 == 0 and not tiled.context  # FP8 products are Triton's
    prefill = WarpgroupPrefill() if whole else tiled.prefill
    warpgroups = replace(tiled, name="warpgroups", decode=decode, prefill=prefill)
    return (tiled,) if decode is tiled.decode and prefill is tiled.prefill else (warpgroups, tiled)
