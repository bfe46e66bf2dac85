"""Kernels compile ahead of time for every SM, on a machine without a GPU, and fit into it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from cuda.bindings import nvrtc
from test_launch import ATTENTION, MOE, attention_dims, moe_dims, norm_dims

from moecompiler.plugins.compile import compile_kernel
from moecompiler.plugins.hopper.compile import compile_image
from moecompiler.plugins.launch import AnyKernel, CudaKernel, Kernel, shared_memory
from moecompiler.plugins.sampling.launch import SamplingTactic
from moecompiler.plugins.tactics import tactics

SMS = (80, 89, 90, 100, 120)


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled here, not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("CUDA_CACHE_DISABLE", "1")  # the assembler says nothing of a kernel that NVRTC finds there
        yield


def all_kernels(sm: int, dtype: str) -> dict[str, list[AnyKernel]]:
    """Of a layer of Mixtral 8x7B, by function."""
    nodes = (
        ("MoE", MOE, moe_dims(-1)),
        ("Attention", ATTENTION, attention_dims(-1, -1, 4096)),
        ("RMSNorm", {"epsilon": 1e-5}, norm_dims(-1, -1)),
        ("AddRMSNorm", {"epsilon": 1e-5}, (norm_dims(-1, -1)[0], *norm_dims(-1, -1))),
    )
    found: dict[str, list[AnyKernel]] = {}
    for op, attributes, dims in nodes:
        for tactic in tactics(op, attributes, dims, dtype, sm):
            for kernel in tactic.kernels:
                found.setdefault(kernel.function, []).append(kernel)
    for sampling in (SamplingTactic("greedy", 32000, dtype), SamplingTactic("drawn", 32000, dtype)):
        found |= {kernel.function: [kernel] for kernel in sampling.kernels}
    return found


def assert_fits(kernel: AnyKernel, sm: int) -> None:
    cubin = compile_kernel(kernel, sm)
    assert cubin.image[:4] == b"\x7fELF"
    assert cubin.name.encode() in cubin.image
    assert cubin.shared <= shared_memory(sm), f"{kernel.function}: {cubin.shared} bytes of shared memory"
    if isinstance(kernel, CudaKernel):
        _, log = compile_image(kernel, sm)
        assert "0 bytes spill stores" in log, log
        assert "serialized" not in log, log  # wgmma instructions that wait for each other


@pytest.mark.parametrize("sm", SMS)
def test_kernels_compile(sm: int) -> None:
    """The largest of each kind on its first SM, and those that differ most on the others."""
    kernels = all_kernels(sm, "bfloat16")
    names = kernels if sm == 90 else ("few_up", "many_up", "many_down", "decode", "prefill", "choose")
    for name in names:
        assert_fits(kernels[name][-1], sm)


@pytest.mark.parametrize(
    ("heads", "head_dim", "window"), [(1, 8, 0), (4, 128, 0), (4, 96, 100), (8, 128, 0), (16, 72, 0), (16, 128, 7)]
)
def test_decode_compiles(heads: int, head_dim: int, window: int) -> None:
    """In C++, for any group of query heads; two programs fit into a multiprocessor, which keeps 1 KB of each for itself."""
    attributes = ATTENTION | {"num_heads": heads, "num_kv_heads": 1, "window": window}
    kernel = tactics("Attention", attributes, attention_dims(-1, -1, -1, head_dim), "float16", 90)[0].kernels[0]
    assert isinstance(kernel, CudaKernel)
    assert_fits(kernel, 90)
    assert 2 * (kernel.shared + 1024) <= 228 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sm"), [("float16", 90), ("bfloat16", 80), ("float16", 120)])
def test_all_kernels_compile(sm: int, dtype: str) -> None:
    """With the copy engine and without, on the least and on the most shared memory."""
    for kernels in all_kernels(sm, dtype).values():
        for kernel in dict.fromkeys(kernels):
            assert_fits(kernel, sm)


def test_a_kernel_whose_arguments_do_not_fit_is_refused() -> None:
    kernel = Kernel("moecompiler.plugins.rmsnorm.kernels", "rms_norm", (("x", "*fp16"),), (("HIDDEN", 64),))
    with pytest.raises(ValueError, match="rms_norm takes"):
        compile_kernel(kernel, 90)


def test_cuda_that_does_not_compile_is_refused() -> None:
    kernel = CudaKernel("moecompiler.plugins.moe/grouped.cu", "grouped_up", (), (("LOCAL", 8),), 12, 0)
    with pytest.raises(RuntimeError, match='"HIDDEN" is undefined'):
        compile_kernel(kernel, 90)


def test_a_kernel_without_a_log_leaves_bytes_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where NVRTC finds it in its cache. NVRTC ends the empty log with a zero, which must not go to Python's shared b" ": what
    the process pads with spaces afterwards, headers of weight files among it, would be padded with zeros."""
    compile_program, get_log, get_cubin = nvrtc.nvrtcCompileProgram, nvrtc.nvrtcGetProgramLog, nvrtc.nvrtcGetCUBIN
    written: list[int] = []

    def compile_silently(program: Any, count: int, options: list[bytes]) -> Any:
        kept = [option for option in options if not option.startswith(b"--ptxas-options")]
        return compile_program(program, len(kept), kept)

    def into_own_memory(get: Any, program: Any, memory: Any) -> Any:
        assert not memoryview(memory).readonly  # asked before all bytes of the tests' process are spoilt
        written.append(len(memory))
        return get(program, memory)

    monkeypatch.setattr(nvrtc, "nvrtcCompileProgram", compile_silently)
    monkeypatch.setattr(nvrtc, "nvrtcGetProgramLog", partial(into_own_memory, get_log))
    monkeypatch.setattr(nvrtc, "nvrtcGetCUBIN", partial(into_own_memory, get_cubin))
    kernel = tactics("Attention", ATTENTION, attention_dims(-1, -1, -1), "float16", 90)[0].kernels[0]
    assert isinstance(kernel, CudaKernel)
    image, log = compile_image.__wrapped__(kernel, 90)
    assert (type(image), log, written) == (bytes, "", [len(image), 1])
    assert bytes([ord(" ")]).hex() == "20"
