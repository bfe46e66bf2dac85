"""What a plan's launch hands to the CUDA driver, which is a recorder here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from cuda.bindings import driver as cuda

from moecompiler.plugins.driver import Function, load, multiprocessors, run, tensor_map
from moecompiler.plugins.launch import (
    AnyKernel,
    Cubin,
    CudaKernel,
    Input,
    Kernel,
    Launch,
    Output,
    TensorMap,
    Workspace,
)

SIGNATURE = (("x", "*fp16"), ("n", "i32"), ("scale", "fp32"))
TRITON = Kernel("module", "kernel", SIGNATURE, ())
CUDA_NUMBERS = CudaKernel("package/file.cu", "kernel", SIGNATURE, (), 4, 0)
CUDA = CudaKernel("package/file.cu", "kernel", (("x", "tensormap"), ("y", "*i16")), (), 12, 100_000)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    made: dict[str, list[tuple[Any, ...]]] = {}

    def record(name: str, *results: Any) -> None:
        def call(*args: Any) -> tuple[Any, ...]:
            made.setdefault(name, []).append(args)
            return (cuda.CUresult.CUDA_SUCCESS, *results)

        monkeypatch.setattr(cuda, name, call)

    record("cuModuleLoadData", 1)
    record("cuModuleGetFunction", cuda.CUfunction(7))
    record("cuFuncSetAttribute")
    record("cuTensorMapEncodeTiled", "map")
    record("cuLaunchKernelEx")
    tensor_map.cache_clear()
    return made


def loaded(kernel: AnyKernel, scratch: int = 0) -> Function:
    return load(Cubin(b"image", kernel.function, 100_000, 12, scratch), kernel)


def test_triton_kernels_get_two_hidden_pointers(calls: dict[str, list[tuple[Any, ...]]]) -> None:
    launch = Launch(0, (3, 2, 1), (Workspace(64), 5, 0.5))
    run([loaded(TRITON, scratch=16)], [launch], [], [], workspace=1000, scratch=5000, stream=0)
    config, _, (values, types), _ = calls["cuLaunchKernelEx"][0]
    assert values == (1064, 5, 0.5, 5000, 0)
    assert types == (ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p)
    assert (config.gridDimX, config.gridDimY, config.blockDimX, config.sharedMemBytes) == (3, 2, 384, 100_000)
    assert calls["cuFuncSetAttribute"][0][2] == 100_000  # above 48 KB it has to be asked for


@pytest.mark.parametrize(("dtype", "width", "kind"), [("bfloat16", 2, "BFLOAT16"), ("int8", 1, "UINT8")])
def test_cuda_kernels_get_what_they_name(
    calls: dict[str, list[tuple[Any, ...]]], dtype: str, width: int, kind: str
) -> None:
    """A tensor map is made of the address, its axes the other way round, strides in bytes; and once."""
    view = TensorMap(Input(0), dtype, (5, 40, 64), (2560, 64), (1, 32, 64))
    launch = Launch(0, (132, 1, 1), (view, Output(0)))
    for _ in range(2):
        run([loaded(CUDA)], [launch], [256], [512], workspace=0, scratch=0, stream=0)
    _, _, (values, types), _ = calls["cuLaunchKernelEx"][0]
    assert values == ("map", 512)
    assert types == (None, ctypes.c_void_p)
    (encoded,) = calls["cuTensorMapEncodeTiled"]
    data_type, rank, address, sizes, strides, box, steps = encoded[:7]
    assert data_type == getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind}")
    assert (rank, address) == (3, 256)
    assert [[int(n) for n in numbers] for numbers in (sizes, strides, box, steps)] == [
        [64, 40, 5],
        [width * 64, width * 2560],
        [64, 32, 1],
        [1, 1, 1],
    ]


@pytest.mark.parametrize("overlapped", [False, True])
def test_clusters_and_overlap_are_attributes(calls: dict[str, list[tuple[Any, ...]]], overlapped: bool) -> None:
    """A launch without either has none."""
    args = (Workspace(0), 1, 1.0)
    launches = [Launch(0, (8, 2, 1), args, overlapped, cluster=4), Launch(0, (8, 2, 1), args)]
    run([loaded(CUDA_NUMBERS)], launches, [], [], workspace=0, scratch=0, stream=0)
    (first, *_), (second, *_) = calls["cuLaunchKernelEx"]
    ids = cuda.CUlaunchAttributeID
    found = {attribute.id: attribute.value for attribute in first.attrs}
    size = found.pop(ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim
    assert (size.x, size.y, size.z) == (4, 1, 1)
    assert set(found) == ({ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION} if overlapped else set())
    assert (first.numAttrs, second.numAttrs) == (1 + overlapped, 0)


def test_persistent_programs_are_as_many_as_the_card_runs(
    calls: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "cuCtxGetDevice", lambda: (cuda.CUresult.CUDA_SUCCESS, cuda.CUdevice(0)))
    monkeypatch.setattr(cuda, "cuDeviceGetAttribute", lambda *args: (cuda.CUresult.CUDA_SUCCESS, 78))
    multiprocessors.cache_clear()
    for programs in (132, 20):
        launch = Launch(0, (programs, 1, 1), (1, 5, 0.5), persistent=True)
        run([loaded(TRITON)], [launch], [], [], workspace=0, scratch=0, stream=0)
    multiprocessors.cache_clear()
    assert [config.gridDimX for config, *_ in calls["cuLaunchKernelEx"]] == [78, 20]


def test_a_refusal_of_the_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cuModuleLoadData", lambda image: (cuda.CUresult.CUDA_ERROR_INVALID_IMAGE, None))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_IMAGE"):
        load(Cubin(b"", "kernel", 0, 4, 0), TRITON)
