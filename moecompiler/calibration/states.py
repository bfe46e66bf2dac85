"""The hidden states of all samples, in memory or, where they are many, in files without a name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch

from moecompiler.errors import UserError

MEMORY_LIMIT = 2 << 30  # bytes of hidden states that are kept in memory


class HiddenStates:
    """``residual`` and ``normed``, both ``[tokens, hidden]`` float32 on the CPU, of all samples one after another: what goes from
    layer to layer, and what a layer's router and experts get. ``spans``: where each sample begins and ends.

    Files lie in ``folder`` and vanish with the process, however it ends; the system writes them out when memory is short.
    """

    def __init__(self, lengths: Sequence[int], hidden: int, folder: Path, memory_limit: int = MEMORY_LIMIT):
        """Raises: UserError where there is no room for a file."""
        self.spans = [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]
        self._files = ExitStack()
        shape = (sum(lengths), hidden)
        self.spilled = 2 * 4 * shape[0] * shape[1] > memory_limit
        self.residual, self.normed = (self._buffer(shape, folder) for _ in range(2))

    def _buffer(self, shape: tuple[int, int], folder: Path) -> torch.Tensor:
        if not self.spilled:
            return torch.zeros(shape)
        try:
            file = self._files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  (the stack closes it)
            reserve(file.fileno(), 4 * shape[0] * shape[1])
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
        except OSError as error:
            raise UserError(
                f"{folder}: no room for the hidden states of {shape[0]} tokens ({error.strerror or error}); lower --calib_size"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


def reserve(descriptor: int, size: int) -> None:
    """Takes the disk's blocks now: a write to a mapped file on a full disk would end the process. Raises: OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
