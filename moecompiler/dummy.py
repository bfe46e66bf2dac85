"""Weights from a seed, for measuring and testing without a checkpoint; and reopening of either kind of source.

Every element is a pure function of seed, tensor and index, so all ranks of all mappings cut the same model, and a rank
makes only the part it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.checkpoint import Source, check_box, check_unchanged, expected_tensors, open_checkpoint
from moecompiler.config import DTYPES, ModelConfig
from moecompiler.errors import UserError
from moecompiler.safetensors_file import numpy_dtype
from moecompiler.smoothed_checkpoint import open_smoothed
from moecompiler.uniform import fill_uniform, key_of
from moecompiler.weights import Shape

NORM_DEVIATION = 0.05
BAND = 1 << 22  # elements of a box that one thread makes at least: fewer take no time


class DummyCheckpoint:
    """A model of ``config`` with weights from ``seed``, in ``dtype``.

    Weights are uniform: those of norms around 1, a matrix's around 0 with deviation ``fan_in ** -0.5``, which is about
    HF's 0.02 for Mixtral and keeps activations at the same size from layer to layer in a model of any width. Large boxes are
    made by up to ``threads`` threads.
    """

    files: tuple[Path, ...] = ()

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: str = "bfloat16", threads: int = 1):
        """Raises: UserError where ``dtype`` is no dtype of weights."""
        if dtype not in DTYPES:
            raise UserError(f"dummy weights of dtype {dtype!r}: it must be one of {', '.join(DTYPES)}")
        self.config, self.seed, self.threads = config, seed, threads
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
        key = key_of(f"{self.seed} {name}")
        if len(whole) == 1:
            deviation, center, start, box = NORM_DEVIATION, 1.0, (0, *start), (1, *shape)
        else:
            deviation, center, box = whole[-1] ** -0.5, 0.0, shape
        out = np.empty(box, numpy_dtype(self._dtype))
        rows = -(-box[0] // max(1, min(self.threads, out.size // BAND)))
        bands = range(0, box[0], rows) if out.size else ()

        def fill(first: int) -> None:
            fill_uniform(out[first : first + rows], key, (start[0] + first, start[1]), center, deviation)

        if len(bands) > 1:
            with ThreadPoolExecutor(len(bands)) as pool:
                list(pool.map(fill, bands))
        else:
            fill(0)
        return out.reshape(shape)

    def identity(self) -> dict[str, Any]:
        return {"kind": "dummy", "seed": self.seed, "dtype": self._dtype, "config": self.config.to_json()}


def open_source(identity: Mapping[str, Any], config: ModelConfig, threads: int = 1) -> Source:
    """Reopens a source from its ``identity()``, for ``config``: the model it was opened with, or fewer of its layers. Weights
    from a seed are made by up to ``threads`` threads.

    Raises: UserError where a file has changed since, or the source is not of that model.
    """
    if identity["kind"] == "hf":
        check_unchanged(identity)
        return _smoothed(open_checkpoint(Path(identity["model_dir"]), config), identity)
    has = expected_tensors(ModelConfig.from_json(identity["config"]))
    for name, shape in expected_tensors(config).items():
        if has.get(name) != shape:
            raise UserError(f"the dummy checkpoint is of another model: {name} is {has.get(name)}, expected {shape}")
    return _smoothed(DummyCheckpoint(config, identity["seed"], identity["dtype"], threads), identity)


def _smoothed(source: Source, identity: Mapping[str, Any]) -> Source:
    """With the scales that AWQ found, if it was opened with such."""
    awq = identity.get("awq")
    return source if awq is None else open_smoothed(source, Path(awq["file"]), awq["sha256"])
