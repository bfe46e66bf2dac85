"""Stages whose hidden states go from GPU to GPU, on a fake of both: the text of those that send them by way of the host."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_gpu import FakeDriver
from fake_session import FakeSampling, Setting

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_record import Made, Record
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.device_communicator import Ways
from moecompiler.runtime.generation import GenerationOptions, generate
from moecompiler.runtime.session import LinkedSession
from moecompiler.runtime.threads import run_in_threads

PP2 = Mapping.create(pp_size=2)
LENGTHS, OUTPUT = (12, 1, 22, 7, 3), 6
HIDDEN, VOCAB, MAX_SEQ_LEN = 16, 24, 40
LIMITS = EngineLimits(5, MAX_SEQ_LEN, MAX_SEQ_LEN, VOCAB)


class Wire:
    """A ``DeviceLink`` of one direction: what is sent is copied when the stream gets there, and so is what is received. ``sent``
    counts messages that were put on the sender's stream and not yet on the receiver's."""

    name = "wire"

    def __init__(self, driver: FakeDriver):
        self.driver, self.letters, self.sizes = driver, deque[bytes](), list[int]()
        self.sent, self.changed = 0, threading.Condition()

    def send(self, pointer: int, nbytes: int, to: int, stream: int) -> None:
        assert (to, self.driver.capturing) == (1, None)
        self.sizes.append(nbytes)
        self.driver.enqueue(lambda: self.letters.append(ctypes.string_at(pointer, nbytes)))
        with self.changed:
            self.sent += 1
            self.changed.notify_all()

    def receive(self, pointer: int, nbytes: int, source: int, stream: int) -> None:
        assert (source, self.driver.capturing) == (0, None)
        self.sent -= 1
        self.driver.enqueue(lambda: ctypes.memmove(pointer, self._taken(nbytes), nbytes))

    def _taken(self, nbytes: int) -> bytes:
        letter = self.letters.popleft()
        assert len(letter) == nbytes
        return letter

    def wait(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.sent > 0, timeout=30)


class OneAtATime:
    """A session on a GPU that all ranks share: one of them calls at a time, and none before what it is to receive is on its
    way."""

    def __init__(self, session: Any, lock: threading.Lock, ready: Callable[[], None]):
        self._session, self._lock, self._ready = session, lock, ready

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._session, name)
        if not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            if name in ("step", "sample"):
                self._ready()
            with self._lock:
                return value(*arguments)

        return call


# a cache that is written at positions, of which each token sees the slots up to its own
_CACHE = """
    slot = Unsqueeze(position_ids, last_axes)
    index = Expand(slot, x_shape)
    "present.0.key" = ScatterElements<axis = 1>("past_key_values.0.key", index, x)
    seen = GreaterOrEqual(slot, slots)
    weights = Cast<to = 10>(seen)
    sum = MatMul(weights, "present.0.key")
    mixed = MatMul(sum, matrix)
    y = Sin(mixed)
"""
_STAGES = (
    f"""(int64[b, s] input_ids, int64[b, s] position_ids, float16[b, {MAX_SEQ_LEN}, {HIDDEN}] "past_key_values.0.key")
    => (float16[b, s, {HIDDEN}] hidden_states, float16[b, {MAX_SEQ_LEN}, {HIDDEN}] "present.0.key") {{
    x = Gather(embedding, input_ids)
    x_shape = Shape(x)
    {_CACHE}
    hidden_states = Identity(y)
    }}""",
    f"""(float16[b, s, {HIDDEN}] hidden_states, int64[b, s] position_ids, int64[b] last_token_ids,
        float16[b, {MAX_SEQ_LEN}, {HIDDEN}] "past_key_values.0.key")
    => (float16[b, {VOCAB}] logits, float16[b, {MAX_SEQ_LEN}, {HIDDEN}] "present.0.key") {{
    x = Identity(hidden_states)
    x_shape = Shape(x)
    {_CACHE}
    at = Unsqueeze(last_token_ids, last_axes_of_one)
    last = GatherND<batch_dims = 1>(y, at)
    logits = MatMul(last, head)
    }}""",
)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of two stages, each of which has a cache."""
    directory, rng = tmp_path_factory.mktemp("stages"), np.random.default_rng(0)
    constants = {
        "embedding": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16),
        "matrix": rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float16),
        "head": rng.standard_normal((HIDDEN, VOCAB)).astype(np.float16),
        "slots": np.arange(MAX_SEQ_LEN),
        "last_axes": np.array([2]),
        "last_axes_of_one": np.array([1]),
    }
    for rank, text in enumerate(_STAGES):
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> stage {text}')
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
        onnx.save(model, directory / f"rank{rank}.onnx")
        (directory / f"rank{rank}.plan").write_text(str(directory / f"rank{rank}.onnx"))
    return directory


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("samples", [False, True])
def test_text_is_that_by_way_of_the_host(samples: bool, micro_batches: int, setting: Setting, stages: Path) -> None:
    """Ragged prompts in slices of two, then decode steps whose graphs hold no message; the last stage samples, or the host."""
    module = importlib.import_module("moecompiler.backends.tensorrt_session")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    options = GenerationOptions(OUTPUT, micro_batches=micro_batches)

    def text(wire: Wire | None) -> list[list[int]]:
        lock = threading.Lock()

        def run(communicator: Communicator) -> list[list[int]]:
            rank = communicator.rank
            kernels = FakeSampling(setting.driver, VOCAB, "float16") if samples and rank else None
            with lock:
                record = Record(Made("10.6.0", 90, "NVIDIA H200", "13.0"), 2, (), {}, {})
                session = module.TensorRTSession(stages, f"rank{rank}", record, LIMITS, None, kernels)
            setting.sessions.add(session)
            assert isinstance(session, LinkedSession)
            communicator.device = Ways([], wire) if wire else None
            guarded = OneAtATime(session, lock, wire.wait if wire and rank else lambda: None)
            return generate(guarded, communicator, PP2, prompts, options).output_ids

        first, second = run_in_threads(2, run)
        assert first == second
        return first

    wire = Wire(setting.driver)
    linked, captured = text(wire), setting.driver.captured
    assert captured > 0
    assert linked == text(None)
    assert not wire.letters
    hidden = 2 * HIDDEN
    parts = {1: ((2, 22), (2, 22), (1, 22)), 2: ((2, 22), (1, 22), (2, 7))}[micro_batches]
    decoded = {1: (5,), 2: (3, 2)}[micro_batches] * (OUTPUT - 1)
    assert wire.sizes == [rows * length * hidden for rows, length in parts] + [rows * hidden for rows in decoded]
