"""What a TensorRT session does with an engine and a GPU, on fakes of both: caches, slices of a prefill, buckets, graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import FakeContext, FakeEngine
from fake_session import LIMITS, Setting
from programs import GRID, MAX_SEQ_LEN, Passage, run_ranks

from moecompiler.backends.onnxruntime import OnnxRuntimeSession, open_session
from moecompiler.errors import UserError
from moecompiler.runtime import weight_loading
from moecompiler.runtime.communicator import Alone, using_communicator
from moecompiler.runtime.device_communicator import Ways
from moecompiler.safetensors_writing import write

ALONE = GRID["one-rank"]


@pytest.fixture(scope="module")
def wanted(engine_files: Path, passage: Passage) -> np.ndarray:
    """ONNX Runtime's own session of the same engine."""
    return run_ranks([OnnxRuntimeSession(open_session(engine_files / "rank0.onnx", 1), LIMITS)], ALONE, passage)


@pytest.mark.parametrize("in_place", [False, True])
def test_logits(in_place: bool, setting: Setting, passage: Passage, wanted: np.ndarray) -> None:
    """Three sequences, prefilled two and one, then decoded in a bucket of four; twice, from an empty cache. Caches that nothing
    writes in place take turns, and each turn has its graph."""
    session = setting.session(in_place)
    for _ in range(2):
        logits = run_ranks([session], ALONE, passage)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, wanted, atol=0.02)
    assert setting.driver.captured == (1 if in_place else 2)
    assert setting.driver.launched == 2 * passage.decode_steps - setting.driver.captured
    (engine,) = setting.engines
    assert [context.profile for context in engine.contexts] == [0, *[1] * setting.driver.captured]
    assert {context.shapes["position_ids"] for context in engine.contexts[1:]} == {(4, 1)}


def test_an_engine_for_one_sequence(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which TensorRT says that the batch is 1, and not that it is free."""
    ids, last = np.arange(5)[None] + 5, np.array([4])
    positions = np.arange(5)[None]

    def logits() -> list[np.ndarray]:
        session = setting.session()
        session.start(1)
        prefilled = session.step(ids, positions, last)
        return [prefilled, session.step(ids[:, :1], positions[:, :1] + 5, np.zeros(1, np.int64))]

    wanted = logits()
    free = FakeEngine.get_tensor_shape
    monkeypatch.setattr(FakeEngine, "get_tensor_shape", lambda engine, name: (1, *free(engine, name)[1:]))
    for got, expected in zip(logits(), wanted, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_every_bucket_has_its_graph(setting: Setting) -> None:
    session = setting.session(in_place=True)
    for batch in (1, 3, 5, 4, 2, 5):
        session.start(batch)
        for position in range(3):
            at = np.full((batch, 1), position)
            assert session.step(np.ones((batch, 1), np.int64), at, np.zeros(batch, np.int64)).shape == (batch, 1536)
    (engine,) = setting.engines
    assert [context.shapes["position_ids"] for context in engine.contexts[1:]] == [(1, 1), (4, 1), (5, 1), (2, 1)]
    assert setting.driver.captured == 4


def test_collectives_are_not_captured(setting: Setting, passage: Passage, wanted: np.ndarray) -> None:
    session = setting.session(plugins={"model.layers.0.mlp/AllReduce_9": "AllReduce"})
    np.testing.assert_allclose(run_ranks([session], ALONE, passage), wanted, atol=0.02)
    assert setting.driver.captured == setting.driver.launched == 0


@pytest.mark.parametrize("waits", [False, True])
def test_collectives_between_gpus_are_captured(waits: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step has run in which no exchange went through the host; and what a peer did not send is not used."""
    session, lost = setting.session(in_place=True, plugins={"model.layers.0.mlp/AllReduce_9": "AllReduce"}), list[str]()

    def check() -> None:
        for each in lost:
            raise RuntimeError(each)

    way = SimpleNamespace(capturable=not waits, takes=lambda nbytes, group: True, check=check)
    way.all_reduce = lambda *_: None
    ranks, enqueue = Alone(), FakeContext.execute_async_v3
    ranks.device = Ways([way])

    def exchanging(context: FakeContext, stream: int) -> bool:
        ranks.device.all_reduce(0, 0, 1, "float16", (0, 1), stream)
        return enqueue(context, stream)

    monkeypatch.setattr(FakeContext, "execute_async_v3", exchanging)
    one = np.zeros((1, 1), np.int64)
    with using_communicator(ranks):
        session.start(1)
        for position in range(3):
            session.step(one, one + position, one[0])
        assert (setting.driver.captured, setting.driver.launched) == ((0, 0) if waits else (1, 2))
        lost.append("a peer did not come")
        with pytest.raises(RuntimeError, match="a peer did not come"):
            session.step(one, one + 3, one[0])


def test_call_takes_and_gives_caches(setting: Setting) -> None:
    """As validation runs it: two steps that hand the caches on are the same as one."""
    session = setting.session()
    names = [name for name in session.input_types if name.startswith("past_key_values.")]
    ids = np.arange(8).reshape(2, 4) + 5
    positions = np.tile(np.arange(4), (2, 1))
    empty = {name: np.zeros((2, 2, MAX_SEQ_LEN, 32), np.float32) for name in names}

    def feeds(at: slice, caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        last = np.full(2, ids[:, at].shape[1] - 1)
        return {"input_ids": ids[:, at], "position_ids": positions[:, at], "last_token_ids": last} | caches

    whole = session.call(feeds(slice(None), empty))
    first = session.call(feeds(slice(0, 3), empty))
    caches = {name: first[name.replace("past_key_values", "present")] for name in names}
    second = session.call(feeds(slice(3, 4), caches))
    assert whole.keys() == second.keys() == {"logits", *(name.replace("past_key_values", "present") for name in names)}
    for name, value in whole.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(second[name], value, atol=0.02, err_msg=name)


def test_memory_is_given_back(setting: Setting) -> None:
    before = setting.driver.free
    session = setting.session()
    session.start(1)
    session.step(np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64), np.zeros(1, np.int64))
    assert setting.driver.free < before
    del session
    assert setting.driver.free == before


def test_no_room(setting: Setting) -> None:
    setting.driver.free = 1 << 18
    with pytest.raises(UserError, match=r"the GPU has no room for .*; use more ranks, or build with a smaller"):
        setting.session()


def test_broken_plan(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "rank0.plan").write_bytes(b"nonsense")
    setting.directory = tmp_path
    with pytest.raises(UserError, match=r"^TensorRT cannot load .*rank0.plan: magic tag does not match$"):
        setting.session()


def test_weights_reach_the_gpu(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, of tensors smaller and larger than a piece; only those named."""
    monkeypatch.setattr(weight_loading, "CHUNK", 1000)
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 255, size).astype(np.uint8) for name, size in (("a", 10), ("b", 3500), ("c", 64))}
    path = tmp_path / "w.safetensors"
    write(path, {name: ("uint8", array.shape) for name, array in arrays.items()}, arrays.__getitem__)
    loaded = weight_loading.load_weights(path, ["b", "a"])
    assert list(loaded) == ["b", "a"]
    for name, buffer in loaded.items():
        np.testing.assert_array_equal(setting.driver.array(buffer.pointer, arrays[name].shape, np.uint8), arrays[name])
    assert weight_loading.load_weights(tmp_path / "absent", []) == {}
    with pytest.raises(UserError, match="holds no d, which the engine wants"):
        weight_loading.load_weights(path, ["d"])
