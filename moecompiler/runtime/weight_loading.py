"""A rank's weight file → the GPU: read from the mapped file into page-locked memory while the chunk before is copied."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moecompiler.errors import UserError
from moecompiler.runtime.device import Buffer, HostBuffer, Stream
from moecompiler.safetensors_file import read_header

CHUNK = 64 << 20  # bytes copied at a time; two such pieces of host memory are in use


def load_weights(path: Path, names: Iterable[str]) -> dict[str, Buffer]:
    """The named tensors of a safetensors file on the GPU; nothing is read where none is named.

    Raises: UserError where the file does not hold one of them, or the GPU has no room.
    """
    wanted = list(names)
    if not wanted:
        return {}
    stored = read_header(path)
    if missing := [name for name in wanted if name not in stored]:
        raise UserError(f"{path}: holds no {missing[0]}, which the engine wants; build it anew")
    mapped = np.memmap(path, np.uint8, mode="r")
    streams, hosts = [Stream(), Stream()], [HostBuffer(CHUNK), HostBuffer(CHUNK)]
    buffers, turn = {}, 0
    for name in wanted:
        tensor = stored[name]
        buffers[name] = Buffer(tensor.nbytes, f"the weights ({name})")
        for at in range(0, tensor.nbytes, CHUNK):
            count = min(CHUNK, tensor.nbytes - at)
            streams[turn].synchronize()  # what this piece of host memory held has been copied
            staged = hosts[turn].array[:count]
            staged[:] = mapped[tensor.offset + at : tensor.offset + at + count]
            streams[turn].upload(buffers[name].pointer + at, staged)
            turn = 1 - turn
    for stream in streams:
        stream.synchronize()
    return buffers
