"""Kernels that choose tokens on the device, as a session uses them; made in ``plugins``, which backends do not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingBuffers:
    """What the kernels read and write for ``rows`` sequences, each the address of its first row on the device.

    ``logits [rows, vocab]`` in the engine's type. ``options [4]`` float64: ``runtime.sampling.device_options``. ``uniforms
    [slots, stride]`` float64 of [0, 1): a sequence's numbers stand in its column. Brought to the next step: ``drawn [rows]``
    int64, how many of them it has used; ``positions [rows]`` int64, the cache slot of its last token, never beyond the last of
    ``slots``; ``seen [rows, vocab]`` uint8, whether it has the token. Written: ``chosen [rows]`` int64, the token, negative as
    ``Sampler.check`` reads it; ``fed [rows]`` int64, the same, but a token in any case. ``workspace``: as much as is asked for.
    """

    rows: int
    slots: int
    stride: int
    logits: int
    options: int
    uniforms: int
    drawn: int
    positions: int
    seen: int
    chosen: int
    fed: int
    workspace: int


class SamplingKernels(Protocol):
    """Chooses as ``runtime.sampling.Sampler`` does, up to the rounding of sums."""

    def workspace(self, rows: int) -> int:
        """Bytes of workspace for that many sequences; grows with them."""

    def enqueue(self, greedy: bool, buffers: SamplingBuffers, stream: int) -> None:
        """Puts the kernels on a stream. Nothing is allocated, and nothing waited for: a CUDA graph can hold them."""
