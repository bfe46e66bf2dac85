"""TensorRT sessions on a fake GPU, and kernels of sampling for it."""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_gpu import FakeDriver, FakeEngine
from programs import MAX_SEQ_LEN

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.sampling_kernels import SamplingBuffers
from moecompiler.backends.tensorrt_record import Made, Record
from moecompiler.runtime.sampling import SamplingOptions, draw, filter_logits, penalize_repetition

LIMITS = EngineLimits(5, MAX_SEQ_LEN, MAX_SEQ_LEN, 1536)
_MADE = Made("10.6.0", 90, "NVIDIA H200", "13.0")


class Setting:
    """Sessions on a fake GPU; ``engines`` are those they have loaded."""

    def __init__(self, driver: FakeDriver, engines: list[FakeEngine], directory: Path):
        self.driver, self.engines, self.directory = driver, engines, directory
        self.sessions = weakref.WeakSet[Any]()

    def session(self, in_place: bool = False, rows: int = 2, samples: bool = False, **changes: Any) -> Any:
        module = importlib.import_module("moecompiler.backends.tensorrt_session")
        names = [f"{layer}.{kind}" for layer in range(4) for kind in ("key", "value")]
        aliases = {f"present.{name}": f"past_key_values.{name}" for name in names} if in_place else {}
        record = Record(_MADE, rows, (), changes.get("plugins", {}), aliases)
        kernels = FakeSampling(self.driver, LIMITS.vocab_size, np.float16) if samples else None
        session = module.TensorRTSession(self.directory, "rank0", record, LIMITS, None, kernels)
        self.sessions.add(session)
        return session


class FakeSampling:
    """The kernels of sampling, by numpy's functions."""

    def __init__(self, driver: FakeDriver, vocab: int, dtype: Any):
        self.driver, self.vocab, self.dtype = driver, vocab, dtype

    def workspace(self, rows: int) -> int:
        return 64 * rows

    def enqueue(self, greedy: bool, buffers: SamplingBuffers, stream: int) -> None:
        self.driver.enqueue(lambda: self._run(greedy, buffers))

    def _run(self, greedy: bool, at: SamplingBuffers) -> None:
        array, shape = self.driver.array, (at.rows, self.vocab)
        array(at.workspace, (self.workspace(at.rows),), np.uint8)[:] = 0xFF
        logits = array(at.logits, shape, self.dtype).astype(np.float32)
        penalty, temperature, spare, top_k = array(at.options, (4,), np.float64).tolist()
        seen = array(at.seen, shape, np.uint8)
        drawn, positions, chosen, fed = (
            array(pointer, (at.rows,), np.int64) for pointer in (at.drawn, at.positions, at.chosen, at.fed)
        )
        options = SamplingOptions(temperature or None, int(top_k), 1 - spare)
        for row in range(at.rows):
            uniform = array(at.uniforms + 8 * (int(drawn[row]) * at.stride + row), (1,), np.float64)[0]
            top = logits[row].max()
            values = penalize_repetition(logits[row], np.flatnonzero(seen[row]).tolist(), penalty)
            if not np.isfinite(top):
                chosen[row], fed[row] = -1 if np.isnan(top) else -2 if top > 0 else -3, 0
            elif greedy:
                chosen[row] = fed[row] = values.argmax()
            else:
                stream: Any = SimpleNamespace(random=lambda uniform=uniform: uniform)
                chosen[row] = fed[row] = draw(filter_logits(values, options), stream)
            if penalty != 1:
                seen[row, fed[row]] = 1
            drawn[row] = min(drawn[row] + 1, at.slots - 1)
            positions[row] = min(positions[row] + 1, at.slots - 1)
