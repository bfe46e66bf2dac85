"""The loop that makes text, as every rank runs it; it knows no backend.

Ranks of a pipeline stage hold the same hidden states, and hand them to the rank of the same place in the next stage. The
first rank of the last stage chooses the tokens and tells all, so all stop together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moecompiler.errors import UserError
from moecompiler.mapping import Mapping
from moecompiler.runtime.communicator import Communicator
from moecompiler.runtime.prompts import check_token_ids
from moecompiler.runtime.rounds import Rank, join_logits, run_round
from moecompiler.runtime.sampling import SamplingOptions
from moecompiler.runtime.session import StageSession

# Called with the step (0: the first token) and the new token of each sequence that is not finished, by index of its prompt.
OnTokens = Callable[[int, dict[int, int]], None]


@dataclass(frozen=True)
class GenerationOptions:
    """``max_output_len`` is in tokens; a sequence ends after any of ``eos_token_ids``; ``keep_logits`` keeps every step's.
    ``micro_batches``: how many parts of a batch follow one another through the pipeline's stages, at most its sequences; None: as
    many as there are stages.

    Raises: UserError where ``max_output_len`` or ``micro_batches`` is below 1.
    """

    max_output_len: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    eos_token_ids: tuple[int, ...] = ()
    keep_logits: bool = False
    micro_batches: int | None = None

    def __post_init__(self) -> None:
        if self.max_output_len < 1:
            raise UserError(
                f"--max_output_len {self.max_output_len}: give the number of tokens to generate, at least 1"
            )
        if self.micro_batches is not None and self.micro_batches < 1:
            raise UserError(f"--micro_batches {self.micro_batches}: give 1 (batches go undivided) or more")


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
    rank = Rank(session, communicator, mapping)
    rounds = [
        run_round(rank, prompts[first : first + session.max_batch_size], first, options, on_tokens)
        for first in range(0, len(prompts), session.max_batch_size)
    ]
    output_ids = [output for one in rounds for output in one.output_ids]
    return Generation(
        output_ids=output_ids,
        logits=join_logits([one.logits for one in rounds if one.logits is not None]),
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
