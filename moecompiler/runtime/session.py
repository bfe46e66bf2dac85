"""What generation needs of a rank's engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from moecompiler.runtime.device_link import DeviceLink
from moecompiler.runtime.sampling import Sampler


class StageSession(Protocol):
    """What runs one rank's engine, KV cache included. The limits are in sequences and tokens."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int

    def start(self, batch: int) -> None:
        """Begins a batch with an empty KV cache."""

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """``x``: ``input_ids [B, S]`` int64 on the first stage, else ``hidden_states [B, S, H]``; ``position_ids [B, S]``
        int64: the cache slots of these tokens; ``last_token_ids [B]`` int64: the index in S of each sequence's last token.
        They are of the batch's sequences ``first`` to ``first + B``: all, or a part in which these have gone together from
        ``start`` on.

        Returns ``logits [B, vocab]`` float32 on the last stage, else ``hidden_states [B, S, H]``. Updates the cache.
        """


@runtime_checkable
class CallableSession(StageSession, Protocol):
    """A session whose engine can also be run on given inputs, caches among them, as validation does."""

    input_types: dict[str, np.dtype]

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One step on inputs by the graph's names: its outputs by theirs, float32."""


@dataclass(frozen=True)
class Sampled:
    """What a step chose where the logits are: ``tokens [B]`` int64 as ``Sampler.check`` reads them, and the logits ``[B, vocab]``
    float32 where they are kept."""

    tokens: np.ndarray
    logits: np.ndarray | None


@runtime_checkable
class SamplingSession(StageSession, Protocol):
    """A session of the last stage that can choose tokens on its device: only tokens come to the host. Unless ``can_sample``, it
    is as any other."""

    can_sample: bool

    def start_sampling(self, sampler: Sampler, prompts: list[list[int]], steps: int, keep_logits: bool) -> None:
        """Follows ``start``: the batch gets at most ``steps`` tokens, chosen as ``sampler`` would, whose numbers it takes."""

    def sample(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> Sampled:
        """``step``, and the tokens it leads to."""

    def sample_next(self) -> Sampled:
        """A step on the tokens of the last one, whatever they were; only where this stage is the first one too, and batches
        go undivided. The device may be a step ahead of what it has returned."""


@runtime_checkable
class LinkedSession(StageSession, Protocol):
    """A session whose hidden states can come from another rank's GPU and go to one without a way through the host."""

    def link(self, link: DeviceLink, source: int | None, to: int | None) -> None:
        """From now on hidden states come from rank ``source`` and go to rank ``to`` by ``link``; None: no stage is on that side.
        Where there is a source, ``x`` of a step is not looked at; where they go on, ``step`` returns an empty array. Nothing is
        waited for but what the host has to give: tokens come back before a part's next step."""


S = TypeVar("S")


@contextmanager
def closing(session: S) -> Iterator[S]:
    """Closes a session at the end, if it can be: what it holds of a device then goes while the interpreter is whole."""
    try:
        yield session
    finally:
        if (close := getattr(session, "close", None)) is not None:
            close()
