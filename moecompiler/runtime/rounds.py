"""One batch of sequences through the stages, in micro-batches that follow one another.

A micro-batch is to the stages what a batch of its own would be: its tokens are chosen and told while others are under way. Each
rank takes micro-batches in the same order, so stage ``k`` works on one while stage ``k + 1`` works on the one before it (GPipe,
Huang et al. 2019, of which this is the forward half); with as many of them as stages, all stages have work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator, on_one_rank
from moecompiler.runtime.device_link import DeviceLink
from moecompiler.runtime.sampling import Sampler
from moecompiler.runtime.session import LinkedSession, Sampled, SamplingSession, StageSession

if TYPE_CHECKING:
    from moecompiler.runtime.generation import GenerationOptions, OnTokens

_NOTHING = np.empty(0, np.float32)
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids, position_ids, both [B, S], and last_token_ids [B]


@dataclass(frozen=True)
class Rank:
    """One rank's engine and its place among the others."""

    session: StageSession
    communicator: Communicator
    mapping: Mapping

    @property
    def sampling_rank(self) -> int:
        return self.mapping.world_size - self.mapping.tp_size

    @property
    def samples(self) -> bool:
        return self.communicator.rank == self.sampling_rank

    @cached_property
    def device(self) -> SamplingSession | None:
        """The session, where this rank chooses tokens and can do it on its device."""
        session = self.session
        return session if self.samples and isinstance(session, SamplingSession) and session.can_sample else None

    @cached_property
    def link(self) -> DeviceLink | None:
        """By which hidden states go from GPU to GPU, where they do."""
        ways = self.communicator.device
        return ways.link if ways is not None and isinstance(self.session, LinkedSession) else None

    def start(self, batch: int) -> None:
        """Begins a batch."""
        self.session.start(batch)
        if self.link is not None and isinstance(self.session, LinkedSession):
            rank, next_stage = self.communicator.rank, self.mapping.tp_size
            source = None if self.mapping.is_first_stage(rank) else rank - next_stage
            to = None if self.mapping.is_last_stage(rank) else rank + next_stage
            self.session.link(self.link, source, to)

    def begin(self, micro_batch: MicroBatch) -> None:
        """A stage before the last runs its part of the step and hands it on. The last one has time until it is to choose: what
        came first is chosen from first."""
        if not self.mapping.is_last_stage(self.communicator.rank):
            self._forward(micro_batch)

    def choose(self, micro_batch: MicroBatch) -> np.ndarray:
        """The step's tokens ``[B]``, on every rank; 0 where a sequence is at its end.

        Raises: UserError, on every rank, where the logits are not finite.
        """
        last = self.mapping.is_last_stage(self.communicator.rank)
        output: Any = self._forward(micro_batch) if last else None
        if micro_batch.kept is not None and self.samples:
            logits: Any = output.logits if isinstance(output, Sampled) else output
            micro_batch.keep(logits)
        return on_one_rank(self.communicator, self.sampling_rank, lambda: micro_batch.choose(output))

    def _forward(self, micro_batch: MicroBatch) -> Any:
        """Logits ``[B, vocab]`` on the last stage, or what its device chose; else None."""
        if micro_batch.device_is_ahead and self.device is not None:
            return self.device.sample_next()
        rank, next_stage = self.communicator.rank, self.mapping.tp_size
        input_ids, position_ids, last_token_ids = micro_batch.inputs
        x = input_ids
        if not self.mapping.is_first_stage(rank):
            x = _NOTHING if self.link is not None else self.communicator.receive(rank - next_stage)
        step = self.device.sample if self.device is not None else self.session.step
        y: Any = step(x, position_ids, last_token_ids, micro_batch.first)
        if self.mapping.is_last_stage(rank):
            return y
        if self.link is None:
            self.communicator.send(y, rank + next_stage)
        return None


@dataclass
class MicroBatch:
    """Sequences ``first`` and those after it of a batch: their tokens so far, which of them go on, the next step's inputs.

    ``device_is_ahead``: a device that is alone knows the next step's tokens and positions, and may be at work on it. ``kept``:
    the logits ``[B, vocab]`` of each step, where they are wanted.
    """

    first: int
    history: list[list[int]]
    sampler: Sampler
    inputs: Inputs
    kept: list[np.ndarray] | None
    device_is_ahead: bool = False
    lengths: np.ndarray = field(init=False)
    active: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array([len(prompt) for prompt in self.history], np.int64)
        self.active = np.ones(len(self.history), bool)

    @property
    def output_ids(self) -> list[list[int]]:
        return [tokens[length:] for tokens, length in zip(self.history, self.lengths, strict=True)]

    def keep(self, logits: np.ndarray) -> None:
        """Adds a step's logits ``[B, vocab]``, zeros where a sequence is at its end."""
        assert self.kept is not None
        self.kept.append(np.where(self.active[:, None], logits, np.float32(0)))

    def choose(self, output: np.ndarray | Sampled) -> np.ndarray:
        """The tokens ``[B]`` that logits lead to, or a device has chosen; 0 where a sequence is at its end."""
        if isinstance(output, Sampled):
            return self.sampler.check(output.tokens, self.history, self.active)
        return self.sampler.choose(output, self.history, self.active)

    def take(self, step: int, tokens: np.ndarray, eos_token_ids: Sequence[int]) -> dict[int, int]:
        """Goes on behind the tokens ``[B]`` of ``step``; returns the new ones by the sequence's number in the batch."""
        new = {int(i): int(tokens[i]) for i in np.flatnonzero(self.active)}
        for i, token in new.items():
            self.history[i].append(token)
        self.active &= ~np.isin(tokens, eos_token_ids)
        self.inputs = tokens[:, None], (self.lengths + step)[:, None], np.zeros_like(self.lengths)
        return {self.first + i: token for i, token in new.items()}


@dataclass(frozen=True)
class Round:
    """What a batch gave; ``logits [batch, steps, vocab]`` on rank 0, where they were asked for; times in seconds."""

    output_ids: list[list[int]]
    logits: np.ndarray | None
    prefill_s: float
    decode_s: float


def run_round(
    rank: Rank, prompts: list[list[int]], first: int, options: GenerationOptions, on_tokens: OnTokens | None
) -> Round:
    """Runs one batch; ``first`` is the index of its first prompt among all."""
    alone = rank.mapping.world_size == 1
    rows = split_rows(len(prompts), options.micro_batches or rank.mapping.pp_size)
    rank.start(len(prompts))
    if rank.device is not None:
        sampler = Sampler(options.sampling, len(prompts), first)
        rank.device.start_sampling(sampler, prompts, options.max_output_len, options.keep_logits)
    whole = [_micro_batch(prompts[each.start : each.stop], each.start, first, options) for each in rows]
    rank.communicator.gather_objects(None)  # a rank that loads slowly does not count as a slow first token
    times = [perf_counter()]
    for each in whole:
        rank.begin(each)
    going = whole
    for step in range(options.max_output_len):
        new: dict[int, int] = {}
        for each in going:
            new |= each.take(step, rank.choose(each), options.eos_token_ids)
            if each is going[-1]:
                times.append(perf_counter())
                if on_tokens is not None:
                    on_tokens(step, {first + i: token for i, token in new.items()})
            if step + 1 < options.max_output_len and each.active.any():
                each.device_is_ahead = alone and len(whole) == 1
                rank.begin(each)
        going = [each for each in going if each.active.any()]
        if not going:
            break

    prefill_s, decode_s = rank.communicator.broadcast((times[1] - times[0], times[-1] - times[1]), rank.sampling_rank)
    output_ids = [output for each in whole for output in each.output_ids]
    return Round(output_ids, _logits_on_rank_0(rank, whole) if options.keep_logits else None, prefill_s, decode_s)


def split_rows(batch: int, micro_batches: int) -> list[range]:
    """The sequences of each micro-batch: at most so many, none empty, their sizes equal or one apart, the larger ones first."""
    count = min(batch, micro_batches)
    each, extra = divmod(batch, count)
    starts = [number * each + min(number, extra) for number in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def join_logits(parts: list[np.ndarray]) -> np.ndarray | None:
    """Logits ``[B, steps, vocab]`` along the batch, the shorter ones filled up with zero steps; None of none."""
    if not parts:
        return None
    steps = max(logits.shape[1] for logits in parts)
    return np.concatenate([np.pad(logits, ((0, 0), (0, steps - logits.shape[1]), (0, 0))) for logits in parts])


def _micro_batch(prompts: list[list[int]], start: int, first: int, options: GenerationOptions) -> MicroBatch:
    return MicroBatch(
        first=start,
        history=[list(prompt) for prompt in prompts],
        sampler=Sampler(options.sampling, len(prompts), first + start),
        inputs=_prefill_inputs(prompts),
        kept=[] if options.keep_logits else None,
    )


def _prefill_inputs(prompts: list[list[int]]) -> Inputs:
    """Prompts padded on the right.

    Padding writes into cache slots past a prompt's end; no query sees a slot past its own position, and by the time one
    gets there a real token has been written to it.
    """
    batch, length = len(prompts), max(map(len, prompts))
    input_ids = np.zeros((batch, length), np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    position_ids = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int64), (batch, length)))
    return input_ids, position_ids, np.array([len(prompt) - 1 for prompt in prompts], np.int64)


def _logits_on_rank_0(rank: Rank, micro_batches: list[MicroBatch]) -> np.ndarray | None:
    """Joins what the sampling rank has kept to ``[batch, steps, vocab]``, and hands it to rank 0."""
    here = join_logits([np.stack(each.kept, axis=1) for each in micro_batches if each.kept]) if rank.samples else None
    if rank.sampling_rank == 0:
        return here
    if here is not None:
        rank.communicator.send(here, 0)
    return rank.communicator.receive(rank.sampling_rank) if rank.communicator.rank == 0 else None
