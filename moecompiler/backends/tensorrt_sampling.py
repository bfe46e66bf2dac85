"""Tokens chosen on the GPU: what the kernels read and hand on from step to step, and how tokens come to the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.sampling_kernels import SamplingBuffers, SamplingKernels
from moecompiler.runtime.device import Buffer, Event, HostBuffer, Stream
from moecompiler.runtime.sampling import Sampler, device_options

_SLOTS = 2  # of the host's memory for tokens: the device is at most one step ahead of what is taken


class DeviceSampling:
    """For up to ``limits.max_batch_size`` sequences. ``tokens`` and ``positions`` are the addresses of what the next decode step
    reads, int64 of each sequence. Raises: UserError where the GPU has no room."""

    def __init__(
        self, kernels: SamplingKernels, vocab: int, limits: EngineLimits, stream: Stream, tokens: int, positions: int
    ):
        self._kernels, self._stream, self._vocab = kernels, stream, vocab
        self._tokens, self._positions = tokens, positions
        self._rows, self._slots = limits.max_batch_size, limits.max_seq_len
        sizes = {
            "options": 4 * 8,
            "uniforms": self._slots * self._rows * 8,
            "drawn": self._rows * 8,
            "seen": self._rows * vocab,
            "chosen": self._rows * 8,
            "workspace": kernels.workspace(self._rows),
        }
        self._buffers = {name: Buffer(nbytes, "sampling") for name, nbytes in sizes.items()}
        self._host = HostBuffer(_SLOTS * self._rows * 8)
        self._events = [Event() for _ in range(_SLOTS)]
        self._copied = self._taken = 0
        self.greedy = True

    def start(self, sampler: Sampler, prompts: list[list[int]], steps: int) -> None:
        """A batch whose sequences begin with ``prompts`` and get at most ``steps`` tokens.

        Raises: ValueError where these are more than there are slots.
        """
        if steps > self._slots:
            raise ValueError(f"{steps} steps, but a sequence has {self._slots} slots")
        options = sampler.options
        self.greedy = options.greedy
        uniforms = np.zeros((steps, self._rows))
        uniforms[:, : len(prompts)] = sampler.uniforms(steps)
        values = {"options": device_options(options), "uniforms": uniforms, "drawn": np.zeros(self._rows, np.int64)}
        if options.repetition_penalty != 1:
            values["seen"] = np.zeros((self._rows, self._vocab), np.uint8)
            for row, tokens in zip(values["seen"], prompts, strict=False):
                row[tokens] = 1
        for name, array in values.items():
            self._stream.upload(self._buffers[name].pointer, array)
        self._stream.synchronize()
        self._copied = self._taken = 0

    def enqueue(self, rows: int, first: int, logits: int) -> None:
        """Chooses for ``rows`` sequences from number ``first`` on, from the logits at an address."""

        def at(name: str, row_bytes: int = 8) -> int:
            return self._buffers[name].pointer + first * row_bytes

        buffers = SamplingBuffers(
            rows,
            slots=self._slots,
            stride=self._rows,
            logits=logits,
            options=self._buffers["options"].pointer,
            uniforms=at("uniforms"),
            drawn=at("drawn"),
            positions=self._positions + first * 8,
            seen=at("seen", self._vocab),
            chosen=at("chosen"),
            fed=self._tokens + first * 8,
            workspace=self._buffers["workspace"].pointer,
        )
        self._kernels.enqueue(self.greedy, buffers, self._stream.handle)

    def copy_out(self) -> None:
        """Puts the copy of the chosen tokens to the host on the stream."""
        if self._copied - self._taken == _SLOTS:
            raise ValueError("the device is two steps ahead: take tokens first")
        slot = self._copied % _SLOTS
        self._stream.download(self._slot(slot), self._buffers["chosen"].pointer)
        self._events[slot].record(self._stream)
        self._copied += 1

    @property
    def ahead(self) -> int:
        """How many steps' tokens are on their way and not taken."""
        return self._copied - self._taken

    @property
    def steps(self) -> int:
        """How many steps' tokens were copied since the start."""
        return self._copied

    def take(self, batch: int, first: int = 0) -> np.ndarray:
        """The tokens of the oldest step that were not taken, of ``batch`` sequences from number ``first`` on, waited for."""
        slot = self._taken % _SLOTS
        self._events[slot].wait()
        self._taken += 1
        return self._slot(slot)[first : first + batch].copy()

    def _slot(self, slot: int) -> Any:
        return self._host.array[: _SLOTS * self._rows * 8].view(np.int64).reshape(_SLOTS, self._rows)[slot]
