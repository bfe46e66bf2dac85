"""Plans of sampling: kernels over parts of each row, then one program per row that chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moecompiler.plugins.launch import (
    TRITON_TYPES,
    Arena,
    Argument,
    Dims,
    Input,
    Kernel,
    Launch,
    Output,
    power_of_two,
)

_MODULE = "moecompiler.plugins.sampling.kernels"
_PART, _LOOP = 1024, 8192  # tokens of a part, and of a pass over a row
_LOGITS, _OPTIONS, _UNIFORMS, _DRAWN, _POSITIONS, _SEEN = map(Input, range(6))
_CHOSEN, _FED = Output(0), Output(1)
_STATE = {"options": "*fp64", "chosen": "*i64", "fed": "*i64", "positions": "*i64", "seen": "*u8", "slots": "i32"}


@dataclass(frozen=True)
class SamplingTactic:
    """One way to choose: ``name`` is ``greedy`` or ``drawn``.

    Inputs: ``logits [rows, vocab]``; ``options [4]`` float64 (penalty, temperature or 0, 1 - top_p, top_k or 0);
    ``uniforms [slots, stride]`` float64 of [0, 1), those of a step side by side; ``drawn [rows]`` int64, the step to draw for;
    ``positions [rows]`` int64, of the token the logits are of; ``seen [rows, vocab]`` uint8, what the penalty is for. The last
    three are brought to the next step. Outputs: ``chosen [rows]`` int64, -1, -2 and -3 where the highest logit is NaN, infinite
    or minus infinity; ``fed [rows]`` int64, the same, but always a token."""

    name: str
    vocab: int
    dtype: str

    @property
    def parts(self) -> int:
        return -(-self.vocab // _PART)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self._greedy_kernels() if self.name == "greedy" else self._drawn_kernels()

    def workspace(self, dims: Dims) -> int:
        return self._plan(dims)[1]

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        return self._plan(dims)[0]

    def _greedy_kernels(self) -> tuple[Kernel, ...]:
        parts = {"tops": "*fp32", "bests": "*fp32", "tokens": "*i32"}
        return (
            self._kernel("highest", self._logits() | parts, BLOCK=_PART),
            self._kernel("choose_highest", parts | _STATE, P_BLOCK=power_of_two(self.parts)),
        )

    def _drawn_kernels(self) -> tuple[Kernel, ...]:
        values, tops, bests = {"values": "*fp32:16"}, {"tops": "*fp32"}, {"bests": "*fp32"}
        made = {"keys": "*i32:16", "weights": "*i64:16"}
        block, loop = power_of_two(self.parts), min(_LOOP, power_of_two(self.vocab))
        draw = {"options": "*fp64", "uniforms": "*fp64", "drawn": "*i64"}
        return (
            self._kernel("scale", self._logits() | values | tops | bests, BLOCK=_PART),
            self._kernel("weigh", values | bests | {"options": "*fp64"} | made, BLOCK=_PART, P_BLOCK=block),
            self._kernel(
                "choose",
                made | tops | draw | _STATE | {"stride": "i32"},
                warps=min(16, max(4, loop // 512)),
                BLOCK=loop,
                P_BLOCK=block,
            ),
        )

    def _logits(self) -> dict[str, str]:
        return {"logits": f"*{TRITON_TYPES[self.dtype]}:16", "options": "*fp64", "seen": "*u8"}

    def _kernel(self, function: str, signature: Mapping[str, str], warps: int = 4, **constants: int) -> Kernel:
        sizes = {"VOCAB": self.vocab, "PARTS": self.parts} | constants
        return Kernel(_MODULE, function, tuple(signature.items()), tuple(sizes.items()), num_warps=warps)

    def _plan(self, dims: Dims) -> tuple[tuple[Launch, ...], int]:
        rows, (slots, stride) = dims[0][0], dims[2]
        arena, shared, each = Arena(), (rows, self.parts, 1), (rows, 1, 1)
        tops, bests, tokens = (arena.take(4 * rows * self.parts) for _ in range(3))
        logits: tuple[Argument, ...] = (_LOGITS, _OPTIONS, _SEEN)
        state: tuple[Argument, ...] = (_CHOSEN, _FED, _POSITIONS, _SEEN, slots)
        if self.name == "greedy":
            launches = (
                Launch(0, shared, (*logits, tops, bests, tokens)),
                Launch(1, each, (tops, bests, tokens, _OPTIONS, *state)),
            )
            return launches, arena.size
        values, keys, weights = (arena.take(size * rows * self.vocab) for size in (4, 4, 8))
        return (
            Launch(0, shared, (*logits, values, tops, bests)),
            Launch(1, shared, (values, bests, _OPTIONS, keys, weights)),
            Launch(2, each, (keys, weights, tops, _OPTIONS, _UNIFORMS, _DRAWN, *state, stride)),
        ), arena.size
