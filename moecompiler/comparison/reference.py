"""The third party: PyTorch in float32, every rank's module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.runs import OpenSession
from moecompiler.comparison.sessions import ModuleSession, ObservedSession
from moecompiler.config import ExportOptions, ModelConfig
from moecompiler.mapping import Mapping
from moecompiler.quantization.recipe import QuantizationRecipe
from moecompiler.quantized import numbers_by
from moecompiler.reference import load_rank_module
from moecompiler.rounded_cache import round_cache
from moecompiler.rounded_inputs import round_inputs
from moecompiler.validation.place import RankPlace
from moecompiler.weights import TensorReader


@dataclass(frozen=True)
class ReferenceModel:
    """A model whose arithmetic is float32 throughout. Its weights are rounded to the dtype of ``options``, or are the numbers
    that codes of ``quantization`` stand for in it, one recipe for each rank: then programs of these are compared by their
    arithmetic alone."""

    config: ModelConfig
    mapping: Mapping
    options: ExportOptions
    quantization: tuple[QuantizationRecipe | None, ...]
    limits: EngineLimits

    def sessions(self, reader: TensorReader) -> OpenSession:
        """Each rank's module is loaded once and kept by what is returned. Raises: UserError where weights cannot be quantized
        so."""
        loaded: dict[int, ModuleSession] = {}

        @contextmanager
        def opened(rank: int) -> Iterator[ObservedSession]:
            if rank not in loaded:
                loaded[rank] = self._load(rank, reader)
            session = loaded[rank]
            session.force(None)
            yield session

        return opened

    def _load(self, rank: int, reader: TensorReader) -> ModuleSession:
        recipe, dtype = self.quantization[rank], self.options.dtype
        quantized = partial(numbers_by, recipe, dtype=dtype)
        module = load_rank_module(self.config, self.mapping, rank, self.options, reader, "float32", quantized)
        round_inputs(module, recipe, dtype)
        round_cache(module, recipe, dtype)
        return ModuleSession(module, RankPlace(self.config, self.mapping, self.options, rank, recipe), self.limits)
