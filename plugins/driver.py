"""Loads cubins and launches them with cuda-bindings, in the current CUDA context."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moecompiler.plugins.launch import (
    AnyKernel,
    Argument,
    Cubin,
    Input,
    Kernel,
    Launch,
    Output,
    TensorMap,
    Workspace,
)

_DEFAULT_SHARED = 48 * 1024


def check(result: Any, *values: Any) -> Any:
    """A driver call's value. Raises: RuntimeError with the driver's own name of the error."""
    if int(result):
        raise RuntimeError(f"CUDA driver: {result.name}")
    return values[0] if values else None


@dataclass(frozen=True)
class Function:
    """A loaded kernel. ``types`` are its arguments' ctypes, without the ``hidden`` ones; None for a tensor map, which says itself
    where it is."""

    cubin: Cubin
    handle: Any
    types: tuple[Any, ...]
    hidden: bool


def load(cubin: Cubin, kernel: AnyKernel) -> Function:
    """Loads a kernel into the current context, with as much dynamic shared memory as it needs."""
    from cuda.bindings import driver

    module = check(*driver.cuModuleLoadData(cubin.image))
    handle = check(*driver.cuModuleGetFunction(module, cubin.name.encode()))
    if cubin.shared > _DEFAULT_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(*driver.cuFuncSetAttribute(handle, attribute, cubin.shared))
    kinds = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "tensormap": None}
    types = [ctypes.c_void_p if kind[0] == "*" else kinds[kind.partition(":")[0]] for _, kind in kernel.signature]
    return Function(cubin, handle, tuple(types), isinstance(kernel, Kernel))


def load_now(function: Function) -> None:
    """Makes the driver load what it may leave for the first launch (CUDA C++ Programming Guide, "Lazy Loading"): that may wait
    for all that the context does, and so for ever where what it does waits for the launch."""
    from cuda.bindings import driver

    check(*driver.cuFuncGetAttribute(driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function.handle))


def run(
    functions: Sequence[Function] | Mapping[int, Function],
    launches: Sequence[Launch],
    inputs: Sequence[int],
    outputs: Sequence[int],
    workspace: int,
    scratch: int,
    stream: int,
) -> None:
    """Launches a plan on ``stream``; all addresses are device pointers. Nothing is allocated and nothing waited for."""

    def value(argument: Argument) -> Any:
        match argument:
            case Input(index):
                return inputs[index]
            case Output(index):
                return outputs[index]
            case Workspace(offset):
                return workspace + offset
            case TensorMap(base, dtype, sizes, strides, box):
                return tensor_map(value(base), dtype, sizes, strides, box)
        return argument

    for launch in launches:
        function = functions[launch.kernel]
        values, types = tuple(map(value, launch.args)), function.types
        if function.hidden:
            values += (scratch if function.cubin.scratch else 0, 0)
            types += (ctypes.c_void_p, ctypes.c_void_p)
        _launch(function, launch, values, types, stream)


@cache
def tensor_map(address: int, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """See ``launch.TensorMap``. Kept: a decode step asks for the same ones every time."""
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    kind, width = {
        "float16": (types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
        "bfloat16": (types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
        "int8": (types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
    }[dtype]
    return check(
        *driver.cuTensorMapEncodeTiled(
            kind,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in reversed(sizes)],
            [driver.cuuint64_t(width * stride) for stride in reversed(strides)],
            [driver.cuuint32_t(size) for size in reversed(box)],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


@cache
def multiprocessors(device: int) -> int:
    """Of a device, by the driver's number."""
    from cuda.bindings import driver

    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return int(check(*driver.cuDeviceGetAttribute(attribute, driver.CUdevice(device))))


def _launch(function: Function, launch: Launch, values: tuple[Any, ...], types: tuple[Any, ...], stream: int) -> None:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    if launch.persistent:
        config.gridDimX = min(launch.grid[0], multiprocessors(int(check(*driver.cuCtxGetDevice()))))
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * function.cubin.num_warps, 1, 1
    config.sharedMemBytes = function.cubin.shared
    config.hStream = stream
    attributes = []
    if launch.overlapped:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if launch.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = launch.cluster, 1, 1
        attributes.append(attribute)
    if attributes:
        config.attrs, config.numAttrs = attributes, len(attributes)
    check(*driver.cuLaunchKernelEx(config, function.handle, (values, types), 0))
