"""The loop that makes text, as every rank runs it; it knows no backend.

Ranks of a pipeline stage hold the same hidden states, and hand them to the rank of the same place in the next stage. The
first rank of the last stage chooses the tokens and tells all, so all stop together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import numpy as np

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator, on_one_rank
from moecompiler.runtime.prompts import check_token_ids
from moecompiler.runtime.sampling import Sampler, SamplingOptions
from moecompiler.runtime.session import Sampled, SamplingSession, StageSession

# Called with the step (0: the first token) and the new token of each sequence that is not finished, by index of its prompt.
OnTokens = Callable[[int, dict[int, int]], None]


@dataclass(frozen=True)
class GenerationOptions:
    """``max_output_len`` is in tokens; a sequence ends after any of ``eos_token_ids``; ``keep_logits`` keeps every step's.

    Raises: UserError where ``max_output_len`` is below 1.
    """

    max_output_len: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    eos_token_ids: tuple[int, ...] = ()
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if self.max_output_len < 1:
            raise UserError(
                f"--max_output_len {self.max_output_len}: give the number of tokens to generate, at least 1"
            )


@dataclass(frozen=True)
class Generation:
    """What was generated, the same on every rank, save that only rank 0 holds ``logits``.

    ``output_ids`` are the new tokens of each prompt, its EOS token included. ``logits [batch, steps, vocab]`` float32 are
    those the tokens were chosen from, zeros after a sequence's end; None unless asked for. Times are in seconds by the clock
    of the rank that chooses tokens: ``time_to_first_token_s`` of the first round, ``prefill_s`` (up to the first tokens) and
    ``decode_s`` (from there to the last) summed over rounds; ``decode_tokens`` are the tokens after each sequence's first.
    """

    output_ids: list[list[int]]
    logits: np.ndarray | None
    time_to_first_token_s: float
    prefill_s: float
    prefill_tokens: int
    decode_s: float
    decode_tokens: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


def generate(
    session: StageSession,
    communicator: Communicator,
    mapping: Mapping,
    prompts: list[list[int]],
    options: GenerationOptions,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues ``prompts`` (the same on every rank), at most ``session.max_batch_size`` of them at a time.

    ``on_tokens`` is called on every rank that gives one.

    Raises: UserError, on every rank alike, where the request does not fit the engine, or the logits are not finite.
    """
    check_request(session, communicator, mapping, prompts, options)
    rank = _Rank(session, communicator, mapping)
    rounds = [
        _run_round(rank, prompts[first : first + session.max_batch_size], first, options, on_tokens)
        for first in range(0, len(prompts), session.max_batch_size)
    ]
    output_ids = [output for one in rounds for output in one.output_ids]
    return Generation(
        output_ids=output_ids,
        logits=_join_logits([one.logits for one in rounds if one.logits is not None]),
        time_to_first_token_s=rounds[0].prefill_s,
        prefill_s=sum(one.prefill_s for one in rounds),
        prefill_tokens=sum(map(len, prompts)),
        decode_s=sum(one.decode_s for one in rounds),
        decode_tokens=sum(map(len, output_ids)) - len(prompts),
    )


def check_request(
    session: StageSession,
    communicator: Communicator,
    mapping: Mapping,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> None:
    """Raises UserError where the engine is made for another number of ranks, or a prompt does not fit it."""
    if communicator.world_size != mapping.world_size:
        raise UserError(
            f"the engine is made for {mapping.world_size} ranks ({mapping}), but {communicator.world_size} run:"
            f" start it with mpirun -n {mapping.world_size}"
        )
    check_token_ids(prompts, session.vocab_size, "the input")
    for number, prompt in enumerate(prompts, 1):
        total = len(prompt) + options.max_output_len
        if len(prompt) > session.max_input_len:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, more than the engine's max_input_len {session.max_input_len}:"
                " shorten it, or compile with a larger --max_input_len"
            )
        if total > session.max_seq_len:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, with --max_output_len {options.max_output_len} that makes {total},"
                f" more than the engine's max_seq_len {session.max_seq_len}: ask for less, or compile with a larger"
                " --max_seq_len"
            )


@dataclass(frozen=True)
class _Rank:
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

    def forward(self, input_ids: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> Any:
        """Logits ``[B, vocab]`` on the last stage, or what its device chose; else None."""
        rank, next_stage = self.communicator.rank, self.mapping.tp_size
        first = self.mapping.is_first_stage(rank)
        x = input_ids if first else self.communicator.receive(rank - next_stage)
        step = self.device.sample if self.device is not None else self.session.step
        y: Any = step(x, position_ids, last_token_ids)
        if self.mapping.is_last_stage(rank):
            return y
        self.communicator.send(y, rank + next_stage)
        return None

    def next_step(self, tokens: np.ndarray, positions: np.ndarray) -> Any:
        """The same, on new tokens ``[B]`` at these positions. A device that is alone has both already."""
        if self.device is not None and self.mapping.world_size == 1:
            return self.device.sample_next()
        return self.forward(tokens[:, None], positions[:, None], np.zeros_like(positions))


@dataclass(frozen=True)
class _Round:
    output_ids: list[list[int]]
    logits: np.ndarray | None  # [batch, steps, vocab], on rank 0
    prefill_s: float
    decode_s: float


def _run_round(
    rank: _Rank, prompts: list[list[int]], first: int, options: GenerationOptions, on_tokens: OnTokens | None
) -> _Round:
    """Runs one batch; ``first`` is the index of its first prompt among all."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    history = [list(prompt) for prompt in prompts]
    active = np.ones(len(prompts), bool)
    sampler = Sampler(options.sampling, len(prompts), first)
    kept: list[np.ndarray] = []

    rank.session.start(len(prompts))
    if rank.device is not None:
        rank.device.start_sampling(sampler, prompts, options.max_output_len, options.keep_logits)
    rank.communicator.gather_objects(None)  # a rank that loads slowly does not count as a slow first token
    times = [perf_counter()]
    output: Any = rank.forward(*_prefill_inputs(prompts))
    for step in range(options.max_output_len):
        choose = partial(_choose, sampler, output, history, active)
        tokens = on_one_rank(rank.communicator, rank.sampling_rank, choose)
        times.append(perf_counter())
        if options.keep_logits and rank.samples:
            logits: Any = output.logits if isinstance(output, Sampled) else output
            kept.append(np.where(active[:, None], logits, np.float32(0)))
        new = {int(i): int(tokens[i]) for i in np.flatnonzero(active)}
        for i, token in new.items():
            history[i].append(token)
        if on_tokens is not None:
            on_tokens(step, {first + i: token for i, token in new.items()})
        active &= ~np.isin(tokens, options.eos_token_ids)
        if step + 1 == options.max_output_len or not active.any():
            break
        output = rank.next_step(tokens, lengths + step)

    prefill_s, decode_s = rank.communicator.broadcast((times[1] - times[0], times[-1] - times[1]), rank.sampling_rank)
    output_ids = [tokens[length:] for tokens, length in zip(history, lengths, strict=True)]
    return _Round(output_ids, _logits_on_rank_0(rank, kept) if options.keep_logits else None, prefill_s, decode_s)


def _choose(sampler: Sampler, output: np.ndarray | Sampled, history: list[list[int]], active: np.ndarray) -> np.ndarray:
    """The tokens ``[B]`` that logits lead to, or a device has chosen; 0 where a sequence is not ``active``."""
    if isinstance(output, Sampled):
        return sampler.check(output.tokens, history, active)
    return sampler.choose(output, history, active)


def _prefill_inputs(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``input_ids``, ``position_ids`` (both ``[B, S]``) and ``last_token_ids [B]`` of prompts padded on the right.

    Padding writes into cache slots past a prompt's end; no query sees a slot past its own position, and by the time one
    gets there a real token has been written to it.
    """
    batch, length = len(prompts), max(map(len, prompts))
    input_ids = np.zeros((batch, length), np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    position_ids = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int64), (batch, length)))
    return input_ids, position_ids, np.array([len(prompt) - 1 for prompt in prompts], np.int64)


def _logits_on_rank_0(rank: _Rank, kept: list[np.ndarray]) -> np.ndarray | None:
    """Stacks the sampling rank's ``[B, vocab]`` of each step to ``[B, steps, vocab]``, and hands it to rank 0."""
    here = np.stack(kept, axis=1) if rank.samples else None
    if rank.sampling_rank == 0:
        return here
    if here is not None:
        rank.communicator.send(here, 0)
    return rank.communicator.receive(rank.sampling_rank) if rank.communicator.rank == 0 else None


def _join_logits(rounds: list[np.ndarray]) -> np.ndarray | None:
    """Rounds ``[B, steps, vocab]`` along the batch, the shorter ones filled up with zero steps."""
    if not rounds:
        return None
    steps = max(logits.shape[1] for logits in rounds)
    return np.concatenate([np.pad(logits, ((0, 0), (0, steps - logits.shape[1]), (0, 0))) for logits in rounds])
