"""Generation whose tokens are chosen on the (fake) GPU: the text of numpy's sampler, a step ahead of the host, from graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeContext
from fake_session import Setting
from programs import Passage

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Alone, using_communicator
from moecompiler.runtime.device_communicator import Ways
from moecompiler.runtime.generation import Generation, GenerationOptions, generate
from moecompiler.runtime.sampling import Sampler, SamplingOptions
from moecompiler.runtime.session import SamplingSession

LENGTHS = (12, 1, 22, 7, 3)
OUTPUT = 8
DRAWN = SamplingOptions(temperature=1.2, top_k=200, top_p=0.95, seed=3, repetition_penalty=1.3)


@pytest.fixture
def prompts(passage: Passage) -> list[list[int]]:
    rows = passage.tokens.tolist()
    return [rows[i % 3][i : i + length] for i, length in enumerate(LENGTHS)]


def text(session: Any, prompts: list[list[int]], **options: Any) -> Generation:
    return generate(session, Alone(), Mapping(), prompts, GenerationOptions(OUTPUT, **options))


@pytest.mark.parametrize("sampling", [SamplingOptions(repetition_penalty=1.2), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("in_place", [False, True])
def test_text_is_that_of_numpy(
    in_place: bool, sampling: SamplingOptions, setting: Setting, prompts: list[list[int]]
) -> None:
    """Ragged batches in every bucket, one after another in the same session, with and without kept logits and an end."""
    host, device = setting.session(in_place), setting.session(in_place, samples=True)
    assert isinstance(device, SamplingSession)
    assert (host.can_sample, device.can_sample) == (False, True)
    for batch in (5, 2, 3):
        wanted = text(host, prompts[:batch], sampling=sampling, keep_logits=True)
        eos = (wanted.output_ids[0][3], wanted.output_ids[1][5])
        launched = setting.driver.launched
        assert text(device, prompts[:batch], sampling=sampling).output_ids == wanted.output_ids
        assert setting.driver.launched > launched, "no graph has run"
        got = text(device, prompts[:batch], sampling=sampling, keep_logits=True)
        assert got.output_ids == wanted.output_ids
        np.testing.assert_array_equal(got.logits, wanted.logits)
        ended = text(host, prompts[:batch], sampling=sampling, eos_token_ids=eos)
        assert text(device, prompts[:batch], sampling=sampling, eos_token_ids=eos).output_ids == ended.output_ids
        assert min(map(len, ended.output_ids)) < OUTPUT


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_micro_batches(in_place: bool, samples: bool, setting: Setting, prompts: list[list[int]]) -> None:
    """Each with its own rows of the cache, turns of it, feeds and graphs; some end before others; then undivided again."""
    session = setting.session(in_place, samples=samples)
    wanted = text(session, prompts, sampling=DRAWN, keep_logits=True)
    eos = (wanted.output_ids[0][3], wanted.output_ids[1][2], wanted.output_ids[4][1])
    ended = text(session, prompts, sampling=DRAWN, eos_token_ids=eos)
    for count in (2, 3):
        for keep_logits in (True, False):
            got = text(session, prompts, sampling=DRAWN, micro_batches=count, keep_logits=keep_logits)
            assert got.output_ids == wanted.output_ids
            if got.logits is not None:
                np.testing.assert_allclose(got.logits, wanted.logits, atol=0.02)
        some = text(session, prompts, sampling=DRAWN, micro_batches=count, eos_token_ids=eos)
        assert some.output_ids == ended.output_ids
    assert text(session, prompts, sampling=DRAWN).output_ids == wanted.output_ids
    parts = {(rows, first) for rows, first, *_ in session._engine.graphs}
    assert parts == {(5, 0), (3, 0), (2, 3), (2, 0), (2, 2), (1, 4)}


def test_contexts_are_not_kept_for_ever(
    setting: Setting, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of all sizes in parts of all sizes: memory stays as it is, and so does the text."""
    session = setting.session(samples=True)
    monkeypatch.setattr(sys.modules["moecompiler.backends.tensorrt_session"], "_MOST_CONTEXTS", 6)
    wanted, kept, free = text(session, prompts).output_ids, list[int](), list[int]()
    for _ in range(3):
        for batch, count in ((5, 1), (5, 2), (4, 3), (3, 3), (2, 2), (5, 4)):
            assert text(session, prompts[:batch], micro_batches=count).output_ids == wanted[:batch]
            kept.append(len(session._engine.contexts))
        free.append(setting.driver.free)
    assert max(kept) <= 6 + 4 * 2
    assert free[1] == free[2]


def test_one_step_ahead(setting: Setting, prompts: list[list[int]]) -> None:
    """While the host looks at a token the next step is on its way, but none after the last; only tokens are copied."""
    session, sampler = setting.session(in_place=True, samples=True), Sampler(SamplingOptions(), 1)
    copied: list[int] = []
    download = session._engine.stream.download
    session._engine.stream.download = lambda array, pointer: (copied.append(array.nbytes), download(array, pointer))
    (engine,), prompt = setting.engines, np.array([prompts[0]])
    runs: list[int] = []
    run = engine.session.run
    engine.session = type("Counted", (), {"run": lambda self, *args: (runs.append(1), run(*args))[1]})()
    for _ in range(2):
        runs.clear()
        session.start(1)
        session.start_sampling(sampler, prompts[:1], OUTPUT, False)
        session.sample(prompt, np.arange(12)[None], np.array([11]))
        assert len(runs) == 1
        for step in range(1, OUTPUT):
            session.sample_next()
            assert len(runs) == step + 1
            assert bool(setting.driver.pending) == (step + 1 < OUTPUT)
        session._engine.stream.synchronize()
        assert len(runs) == OUTPUT
    assert set(copied) == {5 * 8}
    assert setting.driver.captured == 1


def test_rows_that_no_sequence_has_stay_inside(setting: Setting, prompts: list[list[int]]) -> None:
    """Three sequences in a bucket of four, after five whose positions were further on."""
    session = setting.session(in_place=True, samples=True)
    text(session, prompts)
    text(session, prompts[:3])
    fed = setting.driver.array(session._feeds.buffers["position_ids"].pointer, (5,), np.int64)
    assert fed.tolist() == [*(length + OUTPUT - 1 for length in LENGTHS[:3]), OUTPUT - 1, 0]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_logits_that_are_not_finite(
    bad: float, setting: Setting, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sequence and its length are named as they are for numpy; one that has ended may compute what it likes."""
    session = setting.session(in_place=True, samples=True)
    eos = tuple(output[2] for output in text(session, prompts[1:2]).output_ids)
    run = FakeContext._run

    def broken(self: FakeContext, shapes: Any, addresses: dict[str, int]) -> None:
        run(self, shapes, addresses)
        positions = setting.driver.array(addresses["position_ids"], shapes["position_ids"], np.int64)
        logits = setting.driver.array(addresses["logits"], (len(positions), 1536), np.float16)
        logits[positions[:, -1] == LENGTHS[1] + 4] = bad

    monkeypatch.setattr(FakeContext, "_run", broken)
    with pytest.raises(UserError, match=f"sequence 0: the model's logits hold {bad} after {LENGTHS[1] + 5} tokens"):
        text(session, prompts[1:2])
    assert len(text(session, prompts[1:2], eos_token_ids=eos).output_ids[0]) == 3


def test_collectives_are_not_captured(setting: Setting, prompts: list[list[int]]) -> None:
    session = setting.session(samples=True, plugins={"model.layers.0.mlp/AllReduce_9": "AllReduce"})
    assert text(session, prompts).output_ids == text(setting.session(), prompts).output_ids
    assert all(way[-1] is None for way in session._engine.graphs)


def test_ranks_capture_alike(setting: Setting, prompts: list[list[int]]) -> None:
    """NCCL wants a message to be in a graph on every rank or on none. The choice, which one of them makes, is by itself."""
    session, ranks = setting.session(in_place=True, samples=True, plugins={"mlp/AllReduce_9": "AllReduce"}), Alone()
    ranks.device = Ways([])
    for sampling in (SamplingOptions(), DRAWN):
        with using_communicator(ranks):
            said = text(session, prompts[:1], sampling=sampling).output_ids
        assert said == text(setting.session(), prompts[:1], sampling=sampling).output_ids
    assert set(session._engine.graphs) == {(1, 0, 0, None), (1, 0, "choice", True), (1, 0, "choice", False)}


def test_what_uses_something_goes_first(setting: Setting, prompts: list[list[int]]) -> None:
    """Graphs, contexts, the engine, memory, the stream; no matter who lets go."""
    for close in (True, False):
        session = setting.session(samples=True)
        text(session, prompts[:2])
        setting.engines[0].contexts.clear()
        setting.engines.clear()
        setting.driver.destroyed.clear()
        if close:
            session.close()
            session.close()
        del session
        order = list(dict.fromkeys(setting.driver.destroyed))
        assert order == ["graph", "context", "engine", "memory", "stream"]
    assert setting.driver.free == setting.driver.memory


def test_so_it_does_when_the_interpreter_ends(engine_files: Path) -> None:
    """With a session that nobody has closed."""
    code = f"""
import atexit, sys
from pathlib import Path
import fake_gpu
from moecompiler.runtime import device
driver, engines = fake_gpu.FakeDriver(), []
atexit.register(lambda: print(*dict.fromkeys(driver.destroyed)))
sys.modules["tensorrt"], device.driver = fake_gpu.fake_tensorrt(driver, engines), lambda: driver
from moecompiler.backends.base import EngineLimits
from moecompiler.backends.tensorrt_record import Made, Record
from moecompiler.backends.tensorrt_session import TensorRTSession
record = Record(Made("", 90, "", ""), 2, (), {{}}, {{}})
session = TensorRTSession(Path({str(engine_files)!r}), "rank0", record, EngineLimits(2, 40, 40, 1536), None)
engines[0].contexts.clear()
engines.clear()
"""
    path = str(Path(__file__).parent.parent)
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=path, timeout=60)
    assert result.stdout.split()[-1:] == ["stream"], result.stderr
    kinds = result.stdout.split()
    assert kinds.index("context") < kinds.index("engine") < kinds.index("stream")
