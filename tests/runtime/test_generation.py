from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from toy_session import VOCAB, ToySession, continue_without_cache

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Alone, Communicator
from moecompiler.runtime.generation import Generation, GenerationOptions, generate
from moecompiler.runtime.rounds import split_rows
from moecompiler.runtime.sampling import Sampler, SamplingOptions
from moecompiler.runtime.session import Sampled
from moecompiler.runtime.threads import run_in_threads

PROMPTS = [[5, 3, 8, 1], [7], [2, 2, 9, 11, 4, 6, 13], [0, 0]]
MAPPINGS = {
    "tp2": Mapping.create(tp_size=2),
    "pp2": Mapping.create(pp_size=2),
    "pp4": Mapping.create(pp_size=4),
    "pp3, uneven": Mapping.create(pp_size=3),
    "tp2 pp2": Mapping.create(tp_size=2, pp_size=2),
}
STEPS = 4
pytestmark = pytest.mark.timeout(60)


def alone(prompts: list[list[int]], session: ToySession | None = None, **options: Any) -> Generation:
    options = {"max_output_len": 10} | options
    return generate(session or ToySession(), Alone(), Mapping(), prompts, GenerationOptions(**options))


def test_the_toy_is_worth_testing_with() -> None:
    outputs = [tuple(continue_without_cache(prompt, 10)[0]) for prompt in PROMPTS]
    assert len(set(outputs)) == len(PROMPTS)
    assert min(len(set(output)) for output in outputs) > 3


def test_a_ragged_batch_is_what_each_prompt_gives_without_a_cache() -> None:
    generation = alone(PROMPTS, keep_logits=True)
    assert generation.logits is not None
    assert generation.logits.shape == (4, 10, VOCAB)
    for prompt, output, logits in zip(PROMPTS, generation.output_ids, generation.logits, strict=True):
        expected, expected_logits = continue_without_cache(prompt, 10)
        assert output == expected
        np.testing.assert_allclose(logits, expected_logits, atol=1e-5)


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(temperature=0.8, top_k=12, top_p=0.9, seed=1)])
@pytest.mark.parametrize("name", MAPPINGS)
def test_every_mapping_generates_the_same(name: str, sampling: SamplingOptions) -> None:
    mapping, options = MAPPINGS[name], GenerationOptions(10, sampling, (17,), keep_logits=True)

    def run(communicator: Communicator) -> Generation:
        return generate(ToySession(communicator, mapping), communicator, mapping, PROMPTS, options)

    one = alone(PROMPTS, sampling=sampling, eos_token_ids=(17,), keep_logits=True)
    ranks = run_in_threads(mapping.world_size, run)
    for rank in ranks:
        assert rank.output_ids == one.output_ids
        assert (rank.prefill_s, rank.decode_s) == (ranks[0].prefill_s, ranks[0].decode_s)
    assert one.logits is not None
    assert ranks[0].logits is not None
    np.testing.assert_allclose(ranks[0].logits, one.logits, atol=1e-5)
    assert all(rank.logits is None for rank in ranks[1:])


@pytest.mark.parametrize(
    "sampling", [SamplingOptions(), SamplingOptions(temperature=2.0, seed=9, repetition_penalty=1.2)]
)
def test_rounds_of_a_small_engine_give_what_one_batch_gives(sampling: SamplingOptions) -> None:
    prompts, eos = [*PROMPTS, [3, 1, 4, 1, 5]], (6,)
    session = ToySession(max_batch_size=2)
    small = alone(prompts, session, sampling=sampling, eos_token_ids=eos, keep_logits=True)
    large = alone(prompts, sampling=sampling, eos_token_ids=eos, keep_logits=True)
    assert session.batches == [2, 2, 1]
    assert small.output_ids == large.output_ids
    assert small.logits is not None
    assert large.logits is not None
    np.testing.assert_allclose(small.logits, large.logits, atol=1e-5)


def test_a_sequence_ends_with_its_eos_and_the_others_go_on() -> None:
    full = alone(PROMPTS).output_ids
    eos = full[0][2]
    generation = alone(PROMPTS, eos_token_ids=(VOCAB, eos), keep_logits=True)
    expected = [output[: output.index(eos) + 1] if eos in output else output for output in full]
    assert generation.output_ids == expected
    assert len({len(output) for output in expected}) > 1
    assert generation.logits is not None
    for output, logits in zip(expected, generation.logits, strict=True):
        assert logits[: len(output)].any(axis=-1).all()
        assert not logits[len(output) :].any()
    assert generation.decode_tokens == sum(len(output) - 1 for output in expected)


def test_it_stops_when_all_are_finished() -> None:
    full = alone(PROMPTS).output_ids
    steps: list[int] = []
    options = GenerationOptions(10, eos_token_ids=tuple({output[1] for output in full}), keep_logits=True)
    generation = generate(ToySession(), Alone(), Mapping(), PROMPTS, options, lambda step, _: steps.append(step))
    assert steps in ([0], [0, 1])
    assert generation.logits is not None
    assert generation.logits.shape[1] == len(steps)


def test_tokens_are_reported_as_they_come_on_every_rank_that_asks() -> None:
    mapping = MAPPINGS["pp2"]
    prompts, eos = PROMPTS[:3], alone(PROMPTS).output_ids[1][3]
    options = GenerationOptions(8, eos_token_ids=(eos,))

    def run(communicator: Communicator) -> tuple[list[list[int]], list[list[int]]]:
        heard: list[list[int]] = [[] for _ in prompts]

        def on_tokens(step: int, tokens: dict[int, int]) -> None:
            for i, token in tokens.items():
                assert len(heard[i]) == step
                heard[i].append(token)

        session = ToySession(communicator, mapping, max_batch_size=2)
        hear = on_tokens if communicator.rank == 0 else None
        return heard, generate(session, communicator, mapping, prompts, options, hear).output_ids

    (heard, output_ids), (nothing, same) = run_in_threads(2, run)
    assert heard == output_ids == same
    assert nothing == [[], [], []]


def test_times_and_counts() -> None:
    generation = alone(PROMPTS, ToySession(max_batch_size=3))
    assert 0 < generation.time_to_first_token_s < generation.prefill_s
    assert generation.decode_s > 0
    assert (generation.prefill_tokens, generation.decode_tokens) == (14, 4 * 9)
    assert generation.decode_tokens_per_s == pytest.approx(36 / generation.decode_s)
    single = alone(PROMPTS, max_output_len=1)
    assert (single.decode_tokens, single.decode_s, single.decode_tokens_per_s) == (0, 0.0, 0.0)


def test_the_longest_request_fits_exactly() -> None:
    session = ToySession(max_input_len=7, max_seq_len=17)
    assert alone(PROMPTS, session).output_ids == alone(PROMPTS).output_ids


@pytest.mark.parametrize(
    ("prompts", "max_output_len", "message"),
    [
        ([[1], [2] * 17], 4, "prompt 2 has 17 tokens, more than the engine's max_input_len 16: .*--max_input_len"),
        (
            [[1], [2] * 15],
            18,
            "prompt 2 has 15 tokens, with --max_output_len 18 that makes 33, .* max_seq_len 32: .*--max_seq_len",
        ),
        ([[1], []], 4, "prompt 2 is empty"),
        ([], 4, "holds no prompt"),
        ([[1, VOCAB]], 4, "prompt 1 holds token id 24; the model has 0 to 23"),
    ],
)
def test_requests_that_do_not_fit(prompts: list[list[int]], max_output_len: int, message: str) -> None:
    session = ToySession()
    with pytest.raises(UserError, match=message):
        alone(prompts, session, max_output_len=max_output_len)
    assert session.batches == []


def test_no_output_asked_for() -> None:
    with pytest.raises(UserError, match="--max_output_len 0"):
        GenerationOptions(0)


def test_an_engine_for_another_number_of_ranks() -> None:
    with pytest.raises(UserError, match=r"made for 4 ranks \(tp2·pp2\), but 1 run: start it with mpirun -n 4"):
        generate(ToySession(), Alone(), MAPPINGS["tp2 pp2"], PROMPTS, GenerationOptions(3))


def test_logits_that_are_not_finite_are_an_error_on_every_rank() -> None:
    mapping = MAPPINGS["pp2"]

    class Broken(ToySession):
        def step(
            self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0
        ) -> np.ndarray:
            y = super().step(x, position_ids, last_token_ids, first)
            return np.full_like(y, np.nan) if first == 0 and position_ids[0, 0] > 5 else y

    def run(communicator: Communicator) -> str:
        with pytest.raises(UserError) as caught:
            generate(Broken(communicator, mapping), communicator, mapping, PROMPTS, GenerationOptions(10))
        return str(caught.value)

    first, second = run_in_threads(2, run)
    assert first == second
    assert first.startswith("sequence 0: the model's logits hold nan after 7 tokens")


class DeviceToy(ToySession):
    """Chooses tokens itself, with its own copy of the sampler's numbers; knows of no end."""

    can_sample = True

    def start_sampling(self, sampler: Sampler, prompts: list[list[int]], steps: int, keep_logits: bool) -> None:
        self.sampler, self.history, self.keep = sampler, [list(prompt) for prompt in prompts], keep_logits
        self.asked = {"sample": 0, "sample_next": 0}

    def sample(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> Sampled:
        self.asked["sample"] += 1
        logits = self.step(x, position_ids, last_token_ids, first)
        rows = np.zeros(len(self.history), bool)
        rows[first : first + len(x)] = True
        whole = np.zeros((len(self.history), VOCAB), np.float32)
        whole[rows] = logits
        self.tokens = self.sampler.choose(whole, self.history, rows)[rows]
        for row, token in zip(self.history[first:], self.tokens, strict=False):
            row.append(int(token))
        return Sampled(self.tokens, logits if self.keep else None)

    def sample_next(self) -> Sampled:
        self.asked["sample_next"] += 1
        at = np.array([[len(row) - 1] for row in self.history])
        sampled = self.sample(self.tokens[:, None], at, np.zeros(len(at), np.int64))
        self.asked["sample"] -= 1
        return sampled


@pytest.mark.parametrize("name", ["one", *MAPPINGS])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_device_that_samples_gives_the_same(name: str, keep_logits: bool) -> None:
    """Alone it feeds itself after the prefill; among ranks one samples, and is fed. Finished sequences go on there, unseen, until
    all of their micro-batch are."""
    mapping = MAPPINGS.get(name, Mapping())
    sampling = SamplingOptions(temperature=0.8, top_k=12, seed=1, repetition_penalty=1.2)
    options = GenerationOptions(10, sampling, (17, 3), keep_logits)
    sessions: dict[int, DeviceToy] = {}

    def run(communicator: Communicator) -> Generation:
        sessions[communicator.rank] = DeviceToy(communicator, mapping)
        return generate(sessions[communicator.rank], communicator, mapping, PROMPTS, options)

    wanted = alone(PROMPTS, sampling=sampling, eos_token_ids=(17, 3), keep_logits=keep_logits)
    ranks = run_in_threads(mapping.world_size, run)
    assert {tuple(map(tuple, rank.output_ids)) for rank in ranks} == {tuple(map(tuple, wanted.output_ids))}
    if keep_logits:
        np.testing.assert_allclose(ranks[0].logits, wanted.logits, atol=1e-5)
    steps = max(map(len, wanted.output_ids))
    (sampling_rank,) = [rank for rank, session in sessions.items() if hasattr(session, "asked")]
    assert sampling_rank == mapping.world_size - mapping.tp_size
    parts = split_rows(len(PROMPTS), mapping.pp_size)
    of_parts = sum(max(len(wanted.output_ids[i]) for i in rows) for rows in parts)
    fed = {"sample": 1, "sample_next": steps - 1} if name == "one" else {"sample": of_parts, "sample_next": 0}
    assert sessions[sampling_rank].asked == fed


SPLIT = {"tp1": Mapping(), **{name: MAPPINGS[name] for name in ("pp2", "pp3, uneven", "tp2 pp2")}}


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(temperature=0.8, top_p=0.9, seed=4)])
@pytest.mark.parametrize("micro_batches", [2, 3, 9])
@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_give_what_an_undivided_batch_gives(
    name: str, micro_batches: int, sampling: SamplingOptions
) -> None:
    mapping, eos = SPLIT[name], (17, 3)

    def run(count: int) -> list[Generation]:
        options = GenerationOptions(10, sampling, eos, keep_logits=True, micro_batches=count)
        return run_in_threads(
            mapping.world_size,
            lambda each: generate(ToySession(each, mapping), each, mapping, [*PROMPTS, [3, 1, 4]], options),
        )

    undivided, divided = run(1), run(micro_batches)
    assert len({len(output) for output in undivided[0].output_ids}) > 1
    assert [rank.output_ids for rank in divided] == [rank.output_ids for rank in undivided]
    assert divided[0].logits is not None
    # products of numpy's depend, in their last bits, on how many rows there are
    np.testing.assert_allclose(divided[0].logits, undivided[0].logits, atol=1e-6)


def test_a_stage_works_on_a_micro_batch_while_the_next_stage_has_the_one_before() -> None:
    """Each stage waits, in its step, until the other has begun one too: they would wait for ever if they took turns."""
    mapping, running = MAPPINGS["pp2"], threading.Barrier(2, timeout=20)

    class Meeting(ToySession):
        def step(self, *inputs: Any) -> np.ndarray:
            self.taken = getattr(self, "taken", 0) + 1
            # the first stage's first step and the second one's last have nobody beside them
            if self.taken != (1 if self.first else 2 * STEPS):
                running.wait()
            return super().step(*inputs)

    def run(communicator: Communicator) -> list[tuple[int, int]]:
        session = Meeting(communicator, mapping)
        generate(session, communicator, mapping, PROMPTS[:3], GenerationOptions(STEPS))
        return session.steps

    assert run_in_threads(2, run) == [[(0, 2), (2, 1)] * STEPS] * 2


@pytest.mark.parametrize(
    ("batch", "micro_batches", "sizes"), [(1, 4, [1]), (4, 2, [2, 2]), (7, 3, [3, 2, 2]), (3, 8, [1, 1, 1])]
)
def test_sizes_of_micro_batches(batch: int, micro_batches: int, sizes: list[int]) -> None:
    rows = split_rows(batch, micro_batches)
    assert [len(each) for each in rows] == sizes
    assert [row for each in rows for row in each] == list(range(batch))


def test_micro_batches_below_one() -> None:
    with pytest.raises(UserError, match="--micro_batches 0: give 1 "):
        GenerationOptions(3, micro_batches=0)
