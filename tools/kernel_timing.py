"""Kernels outside an engine, for benchmarks and GPU tests: a plan with its memory on torch's device, timed in CUDA graphs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch

from moecompiler.plugins import driver
from moecompiler.plugins.compile import compile_kernel
from moecompiler.plugins.launch import ALIGNMENT, AnyKernel, Dims, Input, Kernel, Launch, Output, Tactic, scratch_bytes


def compute_capability() -> int:
    """Of the current device: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def compile_ahead(kernels: Iterable[AnyKernel], sm: int, processes: int) -> None:
    """Compiles many kernels at once: Triton's into its cache on disk, CUDA C++'s are kept by this process."""
    distinct = list(dict.fromkeys(kernels))
    compile_one = partial(compile_kernel, sm=sm)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool, ThreadPoolExecutor(processes) as threads:
        others = pool.map(compile_one, [kernel for kernel in distinct if isinstance(kernel, Kernel)])
        list(threads.map(compile_one, [kernel for kernel in distinct if not isinstance(kernel, Kernel)]))
        list(others)


@dataclass(frozen=True)
class Prepared:
    """A tactic's plan for given shapes, its kernels loaded and its workspace allocated."""

    functions: dict[int, driver.Function]
    launches: tuple[Launch, ...]
    workspace: torch.Tensor
    scratch: int

    def __call__(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Launches on torch's current stream."""
        self.run(self.launches, inputs, outputs)

    def run(self, launches: Sequence[Launch], inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Launches some of the plan."""
        read, written = ([tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs))
        workspace, stream = self.workspace.data_ptr(), torch.cuda.current_stream().cuda_stream
        driver.run(self.functions, launches, read, written, workspace, workspace + self.scratch, stream)


def prepare(tactic: Tactic, dims: Dims) -> Prepared:
    """Compiles what the plan for inputs of these shapes launches, and loads it."""
    launches = tactic.launches(dims)
    used = {launch.kernel: tactic.kernels[launch.kernel] for launch in launches}
    sm = compute_capability()
    torch.cuda.current_stream()  # makes the context
    functions = {i: driver.load(compile_kernel(kernel, sm), kernel) for i, kernel in used.items()}
    own = tactic.workspace(dims)
    extra = scratch_bytes(launches, {i: function.cubin for i, function in functions.items()})
    workspace = torch.full(
        (own + extra + ALIGNMENT,), 0x7F, dtype=torch.uint8, device="cuda"
    )  # NaN: all is to be written
    return Prepared(functions, launches, workspace, own)


def graph_of(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captures ``work`` after a run outside the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def microseconds(work: Sequence[Callable[[], None]], seconds: float = 0.2, least: int = 5) -> float:
    """Median time of one piece of ``work``, the pieces captured one after another in one graph that is replayed.

    The pieces should touch different memory, so that none finds its data in a cache.
    """

    def all_work() -> None:
        for piece in work:
            piece()

    graph = graph_of(all_work)
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < least or sum(times) < 1e6 * seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times) / len(work)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float32, ‖got‖ where ``want`` is zero; NaN where there is one."""
    error, size = (got.float() - want.float()).norm(), want.float().norm()
    return float(error if size == 0 else error / size)


_READ = Kernel(
    "moecompiler.tools.read_kernel", "read", (("x", "*i32:16"), ("y", "*i32:16"), ("rounds", "i32")), (("BLOCK", 4096),)
)


@dataclass(frozen=True)
class _Read:
    """Reads a tensor of int32 once."""

    name: str = "read"
    kernels: tuple[Kernel, ...] = (_READ,)
    rounds: int = 8

    def workspace(self, dims: Dims) -> int:
        return 0

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        programs = math.prod(dims[0]) // (4096 * self.rounds)
        return (Launch(0, (programs, 1, 1), (Input(0), Output(0), self.rounds)),)


def read_bandwidth(gib: int = 4) -> float:
    """Bytes per second of reading device memory, nothing written."""
    x = torch.randint(-5, 5, (gib << 28,), dtype=torch.int32, device="cuda")
    y = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    tactic = _Read()
    prepared = prepare(tactic, ((x.numel(),),))
    return x.numel() * 4 / (1e-6 * microseconds([lambda: prepared([x], [y])], least=20))


def matmul_peak(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations per second of torch's product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device="cuda")

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return 2 * size**3 / (1e-6 * microseconds([multiply], least=20))
