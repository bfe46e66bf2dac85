"""A language model of a few numpy lines that has all a session has: layers, stages, tensor parallelism, a KV cache.

Every token depends on all that went before and on its position; unwritten cache slots hold garbage, so that a query that
sees a slot too many, or a token written to a wrong slot, changes the text. It is as chaotic as it is small, so it computes in
float64: mappings then differ by less than what a token hangs on.
"""

from __future__ import annotations

import numpy as np

from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Alone, Communicator

VOCAB, HIDDEN, LAYERS = 24, 16, 4
GARBAGE = 50.0


class ToySession:
    """A ``StageSession``; notes in ``batches`` what it was started with, and in ``steps`` the first sequence and the number of
    them of each step."""

    vocab_size = VOCAB

    def __init__(
        self,
        communicator: Communicator | None = None,
        mapping: Mapping | None = None,
        max_batch_size: int = 8,
        max_input_len: int = 16,
        max_seq_len: int = 32,
    ):
        self.communicator = communicator or Alone()
        self.mapping = mapping or Mapping()
        self.max_batch_size, self.max_input_len, self.max_seq_len = max_batch_size, max_input_len, max_seq_len
        self.batches: list[int] = []
        self.steps: list[tuple[int, int]] = []

        rng = np.random.default_rng(3)
        embedding = rng.standard_normal((VOCAB, HIDDEN))
        layers = rng.standard_normal((LAYERS, HIDDEN, HIDDEN))
        head = rng.standard_normal((VOCAB, HIDDEN))

        rank = self.communicator.rank
        tp, tp_rank = self.mapping.tp_size, self.mapping.tp_rank(rank)
        self.group = self.mapping.tp_group(rank)
        self.first, self.last = self.mapping.is_first_stage(rank), self.mapping.is_last_stage(rank)
        self.embedding = embedding
        self.columns = np.array_split(np.arange(HIDDEN), tp)[tp_rank]
        self.layers = [layers[i][self.columns] for i in self.mapping.layers(rank, LAYERS)]
        self.head = np.split(head, tp)[tp_rank]

    def start(self, batch: int) -> None:
        self.batches.append(batch)
        self.caches = [np.full((batch, self.max_seq_len, HIDDEN), GARBAGE) for _ in self.layers]

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        self.steps.append((first, len(x)))
        assert position_ids.dtype == last_token_ids.dtype == np.int64
        if self.first:
            assert x.dtype == np.int64
            x = self.embedding[x]
        rows, cached = np.arange(len(x))[:, None], slice(first, first + len(x))
        slots = np.arange(self.max_seq_len)
        distance = position_ids[:, :, None] - slots  # [B, S, T]
        weights = np.where(distance >= 0, np.exp(-0.1 * distance) * (1 + slots % 5), 0)
        for cache, matrix in zip(self.caches, self.layers, strict=True):
            cache[first + rows, position_ids] = x
            seen = (weights / weights.sum(-1, keepdims=True)) @ cache[cached]
            part = np.ascontiguousarray(seen[..., self.columns] @ matrix)
            x = np.sin(x + 2 * self.communicator.all_reduce(part, self.group))
        if not self.last:
            return x
        logits = np.ascontiguousarray(x[rows[:, 0], last_token_ids] @ self.head.T, dtype=np.float32)
        return self.communicator.all_gather(logits, self.group)


def continue_without_cache(prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """The greedy continuation, each token from the whole text anew, and its logits ``[count, vocab]``."""
    text, all_logits = list(prompt), []
    for _ in range(count):
        session = ToySession()
        session.start(1)
        ids = np.array([text])
        all_logits.append(session.step(ids, np.arange(len(text))[None], np.array([len(text) - 1]))[0])
        text.append(int(all_logits[-1].argmax()))
    return text[len(prompt) :], np.stack(all_logits)
