"""What generation needs of a rank's engine."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


class StageSession(Protocol):
    """What runs one rank's engine, KV cache included. The limits are in sequences and tokens."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int

    def start(self, batch: int) -> None:
        """Begins a batch with an empty KV cache."""

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray) -> np.ndarray:
        """``x``: ``input_ids [B, S]`` int64 on the first stage, else ``hidden_states [B, S, H]``; ``position_ids [B, S]``
        int64: the cache slots of these tokens; ``last_token_ids [B]`` int64: the index in S of each sequence's last token.

        Returns ``logits [B, vocab]`` float32 on the last stage, else ``hidden_states [B, S, H]``. Updates the cache.
        """


@runtime_checkable
class CallableSession(StageSession, Protocol):
    """A session whose engine can also be run on given inputs, caches among them, as validation does."""

    input_types: dict[str, np.dtype]

    def call(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One step on inputs by the graph's names: its outputs by theirs, float32."""
