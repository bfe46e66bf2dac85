"""Weights from a seed, for measuring and testing without a checkpoint; and reopening of either kind of source.

Every element is a pure function of seed, tensor and index, so all ranks of all mappings cut the same model, and a rank
makes only the part it needs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.checkpoint import Source, check_box, check_unchanged, expected_tensors, open_checkpoint
from moecompiler.config import DTYPES, ModelConfig
from moecompiler.errors import UserError
from moecompiler.safetensors_file import numpy_dtype
from moecompiler.weights import Shape

CHUNK = 1 << 16  # elements made together: their integers, scratch and floats stay in the processor's second-level cache
NORM_DEVIATION = 0.05


class DummyCheckpoint:
    """A model of ``config`` with weights from ``seed``, in ``dtype``.

    Weights are uniform: those of norms around 1, a matrix's around 0 with deviation ``fan_in ** -0.5``, which is about
    HF's 0.02 for Mixtral and keeps activations at the same size from layer to layer in a model of any width.
    """

    files: tuple[Path, ...] = ()

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: str = "bfloat16"):
        """Raises: UserError where ``dtype`` is no dtype of weights."""
        if dtype not in DTYPES:
            raise UserError(f"dummy weights of dtype {dtype!r}: it must be one of {', '.join(DTYPES)}")
        self.config, self.seed = config, seed
        self._dtype, self._shapes = dtype, expected_tensors(config)

    def dtype(self, name: str) -> str:
        return self._dtype

    def read(self, name: str, start: Shape, shape: Shape) -> np.ndarray:
        """The box of ``shape`` at ``start``, a new array.

        Raises: KeyError where the model has no such tensor, ValueError where the box is not in it.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        whole = self._shapes[name]
        check_box(name, whole, start, shape)
        key = int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:4], "little")
        if len(whole) == 1:
            deviation, center, start, box = NORM_DEVIATION, 1.0, (0, *start), (1, *shape)
        else:
            deviation, center, box = whole[-1] ** -0.5, 0.0, shape
        out = np.empty(box, numpy_dtype(self._dtype))
        _fill_uniform(out, key, start, center, deviation)
        return out.reshape(shape)

    def identity(self) -> dict[str, Any]:
        return {"kind": "dummy", "seed": self.seed, "dtype": self._dtype, "config": self.config.to_json()}


def _mix(x: np.ndarray, scratch: np.ndarray) -> None:
    """``lowbias32``, in place: a bijection of uint32 in which every input bit sways every output bit.

    By Chris Wellons, public domain: https://github.com/skeeto/hash-prospector
    """

    def fold(shift: int) -> None:
        np.bitwise_xor(x, np.right_shift(x, np.uint32(shift), out=scratch), out=x)

    fold(16)
    np.multiply(x, np.uint32(0x7FEB352D), out=x)
    fold(15)
    np.multiply(x, np.uint32(0x846CA68B), out=x)
    fold(16)


def _fill_uniform(out: np.ndarray, key: int, start: Shape, center: float, deviation: float) -> None:
    """Fills ``out [rows, columns]`` with what a tensor holds from ``start`` on, a hash of key, row and column.

    Rows and columns are hashed one after the other: an index into the whole would need 64 bits, at half the speed.
    """
    rows, columns = out.shape
    row_keys = np.arange(start[0], start[0] + rows, dtype=np.uint32) ^ np.uint32(key)
    _mix(row_keys, np.empty_like(row_keys))
    column_ids = np.arange(start[1], start[1] + columns, dtype=np.uint32)
    width = max(1, min(columns, CHUNK))
    height = max(1, min(rows, CHUNK // width))
    bits, scratch = np.empty((2, height, width), np.uint32)
    floats = np.empty((height, width), np.float32)
    scale = np.float32(math.sqrt(3) * deviation / 2**31)  # uniform on ±a has deviation a / √3
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            target = out[row : row + height, column : column + width]
            h, w = target.shape
            x, y, f = bits[:h, :w], scratch[:h, :w], floats[:h, :w]
            np.bitwise_xor(row_keys[row : row + h, None], column_ids[column : column + w], out=x)
            _mix(x, y)
            np.multiply(x.view(np.int32), scale, out=f, dtype=np.float32, casting="unsafe")
            if center:
                np.add(f, np.float32(center), out=f)
            target[...] = f


def open_source(identity: Mapping[str, Any], config: ModelConfig) -> Source:
    """Reopens a source from its ``identity()``, for ``config``: the model it was opened with, or fewer of its layers.

    Raises: UserError where a file has changed since, or the source is not of that model.
    """
    if identity["kind"] == "hf":
        check_unchanged(identity)
        return open_checkpoint(Path(identity["model_dir"]), config)
    has = expected_tensors(ModelConfig.from_json(identity["config"]))
    for name, shape in expected_tensors(config).items():
        if has.get(name) != shape:
            raise UserError(f"the dummy checkpoint is of another model: {name} is {has.get(name)}, expected {shape}")
    return DummyCheckpoint(config, identity["seed"], identity["dtype"])
