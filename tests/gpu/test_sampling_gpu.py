"""The compiled kernels of sampling choose what numpy chooses, at real sizes and from a graph."""

from __future__ import annotations

import numpy as np
import pytest

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_sampling import DeviceSampling
from moecompiler.errors import UserError
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.runtime.device import Buffer, Device, Graph, Stream
from moecompiler.runtime.sampling import Sampler, SamplingOptions
from moecompiler.weights import NUMPY_DTYPES

pytestmark = pytest.mark.gpu
BATCH, BUCKET, STEPS = 5, 8, 6
OPTIONS = [
    SamplingOptions(),
    SamplingOptions(repetition_penalty=1.3),
    SamplingOptions(temperature=0.8, seed=1),
    SamplingOptions(top_k=50, seed=2),
    SamplingOptions(top_p=0.9, seed=3),
    SamplingOptions(temperature=1.4, top_k=200, top_p=0.95, seed=4, repetition_penalty=1.1),
]


class OnDevice:
    """Kernels for a vocabulary, and the state they hand on."""

    def __init__(self, vocab: int, dtype: str):
        self.device, self.stream = Device(), Stream()
        library = TensorRTPlugins()
        data = library.compile_sampling(vocab, dtype, self.device.info().sm)
        assert data is not None
        self.dtype = NUMPY_DTYPES[dtype]
        self.logits, self.tokens, self.positions = (Buffer(BUCKET * size) for size in (vocab * 4, 8, 8))
        self.stream.zero(self.positions.pointer, BUCKET * 8)
        addresses = self.tokens.pointer, self.positions.pointer
        limits = EngineLimits(BUCKET, 16, 32, vocab)
        self.sampling = DeviceSampling(library.load_sampling(data), vocab, limits, self.stream, *addresses)

    def choose(self, logits: np.ndarray, options: SamplingOptions, history: list[list[int]]) -> np.ndarray:
        """Tokens ``[steps, batch]`` of ``logits [steps, batch, vocab]``; all but the first step from a graph."""
        steps, batch, vocab = logits.shape
        self.sampling.start(Sampler(options, batch), history, steps)
        tokens, graph = [], None
        for step in logits:
            rows = np.zeros((BUCKET, vocab), self.dtype)
            rows[:batch] = step
            self.stream.upload(self.logits.pointer, rows)
            self.stream.synchronize()
            graph = self._enqueue(graph)
            self.sampling.copy_out()
            tokens.append(self.sampling.take(batch))
        return np.stack(tokens)

    def _enqueue(self, graph: Graph | None) -> Graph:
        def work() -> None:
            self.sampling.enqueue(BUCKET, 0, self.logits.pointer)

        if graph is not None:
            graph.launch(self.stream)
            return graph
        work()
        return self.stream.capture(work)


@pytest.mark.parametrize("vocab", [100, 32000, 128256, 262144])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tokens_are_those_of_numpy(vocab: int, dtype: str) -> None:
    rng = np.random.default_rng(vocab)
    logits = (3 * rng.standard_normal((STEPS, BATCH, vocab), np.float32)).astype(NUMPY_DTYPES[dtype])
    device, prompts = OnDevice(vocab, dtype), rng.integers(0, vocab, (BATCH, 40)).tolist()
    for options in OPTIONS:
        sampler, history, wanted = Sampler(options, BATCH), [list(prompt) for prompt in prompts], []
        for step in logits.astype(np.float32):
            wanted.append(sampler.choose(step, history))
            for row, token in zip(history, wanted[-1], strict=True):
                row.append(int(token))
        np.testing.assert_array_equal(device.choose(logits, options, prompts), np.stack(wanted), str(options))
    positions = np.empty(BUCKET, np.int64)
    device.stream.download(positions, device.positions.pointer)
    device.stream.synchronize()
    assert positions.tolist() == [31] * BUCKET, "36 steps, 32 slots"


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite(options: SamplingOptions) -> None:
    logits = np.random.default_rng(0).standard_normal((1, BATCH, 32000), np.float32)
    logits[0, 1, 31999], logits[0, 2, 5], logits[0, 3] = np.nan, np.inf, -np.inf
    (tokens,) = OnDevice(32000, "float32").choose(logits, options, [[1]] * BATCH)
    assert tokens[[1, 2, 3]].tolist() == [-1, -2, -3]
    assert (tokens[[0, 4]] >= 0).all()
    with pytest.raises(UserError, match="sequence 2: the model's logits hold inf after 1 tokens"):
        Sampler(options, BATCH).check(tokens, [[1]] * BATCH, np.arange(BATCH) == 2)
