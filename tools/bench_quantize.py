"""How fast weights are quantized, against reading the same bytes from disk in the same run.

    python tools/bench_quantize.py --directory build/bench-quantize

writes a file of bfloat16 weights there, reads it with a cold cache, quantizes it from memory and from the mapped, cold file, and
removes it. GB/s count the unquantized bytes. The last column is the mapped file's speed over the disk's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from moecompiler.quantization.arithmetic import quantize
from moecompiler.quantization.schemes import FP8, INT8, NVFP4, WeightScheme, int4
from moecompiler.weights import NUMPY_DTYPES

SCHEMES = (INT8, FP8, int4(128), int4(64, symmetric=False), NVFP4)
BLOCK = 16 << 20


def write_weights(path: Path, dtype: str, out: int, features: int, matrices: int) -> None:
    """Normally distributed weights of a model's size, one matrix over and over."""
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((out, features), np.float32) * np.float32(0.02)).astype(NUMPY_DTYPES[dtype])
    with path.open("wb") as file:
        for _ in range(matrices):
            file.write(matrix.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_all(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def best_of(count: int, prepare: Callable[[], None], work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(count):
        prepare()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def quantize_mapped(path: Path, shape: tuple[int, ...], dtype: str, scheme: WeightScheme, threads: int) -> None:
    """One matrix at a time, from a mapping of its own: pages that a mapping has seen cannot be dropped from the cache."""
    for matrix in np.memmap(path, NUMPY_DTYPES[dtype], "r", 0, shape).view(np.ndarray):
        quantize(matrix, scheme, dtype, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--dtype", choices=sorted(set(NUMPY_DTYPES) - {"int64"}), default="bfloat16")
    parser.add_argument("--out", type=int, default=14336)
    parser.add_argument("--in", type=int, default=4096, dest="features")
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    path = options.directory / "weights"
    shape, dtype = (options.matrices, options.out, options.features), options.dtype
    drop = partial(drop_cache, path)
    try:
        write_weights(path, dtype, options.out, options.features, options.matrices)
        size = path.stat().st_size
        disk = size / best_of(options.repeat, drop, partial(read_all, path)) / 1e9
        print(f"{dtype} {list(shape)}, {size / 1e9:.2f} GB; reading it from disk: {disk:.2f} GB/s")
        print(f"{'scheme':28} {'threads':>7} {'in memory':>10} {'mapped':>8} {'of disk':>8}")
        held = np.fromfile(path, NUMPY_DTYPES[dtype], options.out * options.features).reshape(shape[1:])
        for scheme, threads in itertools.product(SCHEMES, options.threads):
            in_memory = best_of(options.repeat, lambda: None, partial(quantize, held, scheme, dtype, threads))
            mapped = best_of(options.repeat, drop, partial(quantize_mapped, path, shape, dtype, scheme, threads))
            speed = size / mapped / 1e9
            print(
                f"{scheme!s:28} {threads:7} {held.nbytes / in_memory / 1e9:10.2f} {speed:8.2f} {speed / disk:8.2f}",
                flush=True,
            )
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
