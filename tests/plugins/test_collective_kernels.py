"""The kernels of collectives, compiled for the CPU: ranks are threads, each with its stream of launches, and what they exchange
has the bits of the way through the host."""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecompiler.plugins.collectives import launch
from moecompiler.plugins.collectives.launch import Sizes
from moecompiler.plugins.hopper.compile import compile_image
from moecompiler.plugins.launch import Launch
from moecompiler.runtime.collective_kernels import Region
from moecompiler.runtime.communicator import Communicator, add_in_rank_order
from moecompiler.runtime.threads import run_in_threads
from moecompiler.weights import NUMPY_DTYPES

SIZES = Sizes(threads=8, programs=4, one_shot=512, slot=2048)
DTYPES = ("float16", "bfloat16", "float32")
KERNELS = ("one_shot", "two_shot", "gather", "one_shot_norm")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The library of a type's kernels, made when it is first asked for."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for the CPU")
    folder = tmp_path_factory.mktemp("emulated")

    @functools.cache
    def library(dtype: str) -> ctypes.CDLL:
        return ctypes.CDLL(str(build(folder, "collectives.cpp", dtype, "-shared", "-fPIC")))

    return library


def build(folder: Path, source: str, dtype: str, *flags: str) -> Path:
    """Compiles a file of ``emulated``."""
    kernels, here = launch.kernels(dtype, SIZES), Path(__file__).parent / "emulated"
    macros = [f"-D{name}={value}" for name, value in kernels["gather"].constants]
    macros += [f"-DCOMPILE_{name}" for name in kernels]
    # a file beside the one that includes it is found before those of -I: so the kernels are copied to where that is ours
    for each in (*Path(str(resources.files("moecompiler.plugins.collectives"))).glob("*.cu*"), *here.iterdir()):
        shutil.copy(each, folder)
    target = folder / f"{Path(source).stem}-{dtype}"
    common = ("-std=c++20", "-O1", "-pthread", "-Wall", "-Wno-unknown-pragmas")
    subprocess.run(["g++", *common, *flags, *macros, folder / source, "-o", target], check=True)
    return target


class Rank:
    """A rank's region and what it launches, on the CPU."""

    def __init__(self, communicator: Communicator, library: ctypes.CDLL, dtype: str, patience_s: float = 60.0):
        group = range(communicator.world_size)
        self.dtype, self._library = dtype, library
        self._memory = aligned(SIZES.region)
        self.told = np.zeros(1, np.uint32)
        pointers = communicator.gather_objects(self._memory.ctypes.data)
        head = launch.head(communicator.rank, pointers, int(patience_s * 1e9), self.told.ctypes.data)
        self._memory[: len(head)] = np.frombuffer(head, np.uint8)
        self.region = Region(self._memory.ctypes.data, len(group), SIZES.programs)
        self.names: list[str] = []

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        y = aligned(x.nbytes).view(x.dtype)
        self._run(launch.all_reduce(x.ctypes.data, y.ctypes.data, x.size, self.dtype, self.region, SIZES))
        return y.reshape(x.shape)

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        rows, columns = x.shape
        y = aligned(x.nbytes * self.region.ranks).view(x.dtype)
        self._run(launch.all_gather(x.ctypes.data, y.ctypes.data, rows, columns, self.dtype, self.region, SIZES))
        return y.reshape(rows, -1)

    def all_reduce_add_rms_norm(
        self, residual: np.ndarray, branch: np.ndarray, weight: np.ndarray, epsilon: float
    ) -> tuple[np.ndarray, np.ndarray]:
        (rows, hidden), inputs = branch.shape, (residual, branch, weight)
        assert launch.norm_fits(rows, hidden, self.dtype, self.region, SIZES)
        y, x = (aligned(branch.nbytes).view(branch.dtype).reshape(branch.shape) for _ in range(2))
        given, made = tuple(each.ctypes.data for each in inputs), (y.ctypes.data, x.ctypes.data)
        self._run([launch.one_shot_norm(given, made, rows, hidden, epsilon, self.region, SIZES)])  # type: ignore[arg-type]
        return y, x

    def _run(self, launches: Any) -> None:
        for name, each in launches:
            assert isinstance(each, Launch)
            self.names.append(name)
            assert each.grid[0] <= SIZES.programs
            signature = launch.kernels(self.dtype, SIZES)[name].signature
            kinds = {"*u8": ctypes.c_void_p, "i32": ctypes.c_int, "fp32": ctypes.c_float}
            values = [kinds[kind](value) for (_, kind), value in zip(signature, each.args, strict=True)]
            getattr(self._library, f"run_{name}")(each.grid[0], *values)


def aligned(nbytes: int) -> np.ndarray:
    """Zeros, at a multiple of 256."""
    raw = np.zeros(nbytes + 256, np.uint8)
    return raw[-raw.ctypes.data % 256 :][:nbytes]


def random(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    array = aligned(int(np.prod(shape)) * NUMPY_DTYPES[dtype].itemsize).view(NUMPY_DTYPES[dtype]).reshape(shape)
    array[...] = np.random.default_rng(seed).standard_normal(shape)
    return array


def total(parts: list[np.ndarray]) -> np.ndarray:
    return add_in_rank_order([part.astype(np.float32) for part in parts]).astype(parts[0].dtype)


@pytest.mark.parametrize(("dtype", "ranks"), [("float16", 2), ("bfloat16", 3), ("float32", 4)])
def test_the_bits_of_the_host(dtype: str, ranks: int, compiled: Callable[[str], ctypes.CDLL]) -> None:
    """Turn after turn over the same regions: one shot, two, several pieces, gathers of all units, of sizes nothing divides."""
    library, width = compiled(dtype), NUMPY_DTYPES[dtype].itemsize
    sizes = [1, 3, 8, 33, 128 // width, 512 // ranks // width, 1000, 700, 5000]
    shapes = [(1, 1), (3, 5), (2, 16), (5, 70), (2, 900), (9, 24)]

    def run(communicator: Communicator) -> list[str]:
        rank = Rank(communicator, library, dtype)
        turns = iter(range(10_000))
        for size, shape in itertools.islice(zip(itertools.cycle(sizes), itertools.cycle(shapes), strict=False), 18):
            seeds = [ranks * next(turns) + each for each in range(ranks)]
            parts = [random((size,), dtype, seed) for seed in seeds]
            np.testing.assert_array_equal(rank.all_reduce(parts[communicator.rank]), total(parts), strict=True)
            parts = [random(shape, dtype, seed) for seed in seeds]
            gathered = rank.all_gather(parts[communicator.rank])
            np.testing.assert_array_equal(gathered, np.concatenate(parts, axis=-1), strict=True)
        assert rank.told[0] == 0
        return rank.names

    for names in run_in_threads(ranks, run):
        assert {"one_shot", "two_shot", "gather"} == set(names)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_norm(dtype: str, compiled: Callable[[str], ctypes.CDLL]) -> None:
    """``x`` to the bit, ``y`` up to the order in which squares are added."""
    library, ranks, hidden, epsilon = compiled(dtype), 2, 24, 1e-5

    def run(communicator: Communicator) -> None:
        rank = Rank(communicator, library, dtype)
        for rows in (1, 4, 5, 2):
            parts = [random((rows, hidden), dtype, 10 * rows + each) for each in range(ranks)]
            residual, weight = random((rows, hidden), dtype, 5), random((hidden,), dtype, 6)
            y, x = rank.all_reduce_add_rms_norm(residual, parts[communicator.rank], weight, epsilon)
            wanted = residual + total(parts)
            np.testing.assert_array_equal(x, wanted)
            wide = wanted.astype(np.float32)
            scaled = (wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)
            np.testing.assert_allclose(y, weight * scaled, rtol=2e-3 if dtype == "float16" else 1e-6)

    run_in_threads(ranks, run)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile the kernels for the CPU")
def test_no_races(tmp_path: Path) -> None:
    """The thread sanitizer reports accesses that no acquire and release put in order, whatever order this CPU happens to keep."""
    program = build(tmp_path, "races.cpp", "float32", "-g", "-fsanitize=thread")
    done = subprocess.run([program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize("size", [8, 1000])
def test_a_peer_that_does_not_come(size: int, compiled: Callable[[str], ctypes.CDLL]) -> None:
    """The kernel ends all the same, says who is missing, and those behind it do not wait again."""
    library = compiled("float32")

    def run(communicator: Communicator) -> int:
        rank = Rank(communicator, library, "float32", patience_s=0.2)
        if communicator.rank != 1:
            for _ in range(2):
                rank.all_reduce(random((size,), "float32", 0))
        communicator.gather_objects(None)
        return int(rank.told[0])

    assert run_in_threads(2, run) == [2, 0]


def test_turns_go_round(compiled: Callable[[str], ctypes.CDLL]) -> None:
    """After some days of decoding: their numbers start anew, and what was never written is taken for no turn."""
    library = compiled("float32")

    def run(communicator: Communicator) -> None:
        rank = Rank(communicator, library, "float32")
        rank._memory[:4].view(np.uint32)[0] = 2**32 - 6
        communicator.gather_objects(None)
        for size in (8, 1000, 8, 1000, 1000, 8, 1000, 1000):
            parts = [random((size,), "float32", each) for each in range(2)]
            np.testing.assert_array_equal(rank.all_reduce(parts[communicator.rank]), total(parts))

    run_in_threads(2, run)


@pytest.mark.parametrize(
    ("dtype", "sm", "names"),
    [
        ("float16", 90, KERNELS),
        ("bfloat16", 80, ("one_shot", "one_shot_norm")),
        ("float32", 120, ("one_shot", "gather")),
        *(pytest.param(dtype, sm, KERNELS, marks=pytest.mark.slow) for dtype in DTYPES for sm in (80, 90, 100, 120)),
    ],
)
def test_kernels_compile(dtype: str, sm: int, names: tuple[str, ...]) -> None:
    """In their usual sizes; a region is what the host takes it for."""
    kernels = launch.kernels(dtype)
    assert set(kernels) == set(KERNELS)
    for name in names:
        image, _ = compile_image(kernels[name], sm)
        assert image.startswith(b"\x7fELF")
        assert name.encode() in image
