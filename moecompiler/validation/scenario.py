"""What engines and reference are fed: batches of token sequences, of which a prefix is prefilled and the rest decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moecompiler.backends.base import EngineLimits


@dataclass(frozen=True)
class Step:
    """One call of a first stage: all three as ``StageSession.step`` takes them."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    last_token_ids: np.ndarray


@dataclass(frozen=True)
class Scenario:
    """``tokens [batch, length]`` int64, the first ``prompt_lengths[i]`` of row i prefilled, then ``steps`` decoded with the
    given tokens (teacher forcing), one at a time. ``spare [rows, length]``: tokens that would do as well in place of a row's."""

    name: str
    tokens: np.ndarray
    prompt_lengths: tuple[int, ...]
    decode_steps: int
    spare: np.ndarray | None = None

    def candidates(self) -> np.ndarray:
        """Rows and spare rows, ``[rows, length]``."""
        return self.tokens if self.spare is None else np.concatenate((self.tokens, self.spare))

    def steps(self) -> list[Step]:
        lengths = np.array(self.prompt_lengths, np.int64)
        width = int(lengths.max())
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int64), (len(lengths), width)))
        # behind a prompt stand tokens that are not those to come, or padding that leaks would not be noticed
        prompts = np.where(positions < lengths[:, None], self.tokens[:, :width], self.tokens[0, 0])
        result = [Step(prompts, positions, lengths - 1)]
        for step in range(self.decode_steps):
            at = (lengths + step)[:, None]
            result.append(Step(np.take_along_axis(self.tokens, at, axis=1), at, np.zeros_like(lengths)))
        return result

    def predicted_positions(self) -> np.ndarray:
        """Which token of its row each step's logits come from, ``[batch, steps]``; they predict the one after it."""
        lengths = np.array(self.prompt_lengths, np.int64)
        return lengths[:, None] - 1 + np.arange(self.decode_steps + 1)


def random_scenario(limits: EngineLimits, seed: int = 0, decode_steps: int = 3) -> Scenario:
    """Random tokens in a ragged batch of at most 3, and spare rows, to choose from those that no rounding sends to another
    expert."""
    rng = np.random.default_rng(seed)
    batch = min(3, limits.max_batch_size)
    longest = max(1, min(17, limits.max_input_len, limits.max_seq_len - decode_steps))
    decode_steps = min(decode_steps, limits.max_seq_len - longest)
    lengths = tuple(max(1, longest - 5 * row) for row in range(batch))
    tokens = rng.integers(0, limits.vocab_size, (_CANDIDATES, longest + decode_steps))
    return Scenario("random", tokens[:batch], lengths, decode_steps, tokens[batch:])


_CANDIDATES = 16


def text_scenario(token_ids: Sequence[int], limits: EngineLimits, tokens_in_all: int = 1024) -> Scenario | None:
    """Real text, cut into windows of which a part is prefilled and most is decoded; None where there is too little."""
    batch = min(8, limits.max_batch_size)
    window = min(limits.max_seq_len, max(4, tokens_in_all // batch), len(token_ids) // batch)
    if window < 4:
        return None
    tokens = np.array(token_ids[: batch * window], np.int64).reshape(batch, window)
    prompt = max(1, min(limits.max_input_len, window // 4))
    lengths = tuple(max(1, prompt - row) for row in range(batch))
    return Scenario("text", tokens, lengths, window - prompt)
