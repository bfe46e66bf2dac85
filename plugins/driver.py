"""Loads cubins and launches them with cuda-bindings, in the current CUDA context."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moecompiler.plugins.launch import Argument, Cubin, Input, Kernel, Launch, Output, Workspace

_DEFAULT_SHARED = 48 * 1024


def check(result: Any, *values: Any) -> Any:
    """A driver call's value. Raises: RuntimeError with the driver's own name of the error."""
    if int(result):
        raise RuntimeError(f"CUDA driver: {result.name}")
    return values[0] if values else None


@dataclass(frozen=True)
class Function:
    """A loaded kernel. ``types`` are its arguments' ctypes, Triton's two hidden pointers included."""

    cubin: Cubin
    handle: Any
    types: tuple[Any, ...]


def load(cubin: Cubin, kernel: Kernel) -> Function:
    """Loads a kernel into the current context, with as much dynamic shared memory as it needs."""
    from cuda.bindings import driver

    module = check(*driver.cuModuleLoadData(cubin.image))
    handle = check(*driver.cuModuleGetFunction(module, cubin.name.encode()))
    if cubin.shared > _DEFAULT_SHARED:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(*driver.cuFuncSetAttribute(handle, attribute, cubin.shared))
    numbers = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    types = [ctypes.c_void_p if kind[0] == "*" else numbers[kind.partition(":")[0]] for _, kind in kernel.signature]
    return Function(cubin, handle, (*types, ctypes.c_void_p, ctypes.c_void_p))


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

    def value(argument: Argument) -> int | float:
        match argument:
            case Input(index):
                return inputs[index]
            case Output(index):
                return outputs[index]
            case Workspace(offset):
                return workspace + offset
        return argument

    for launch in launches:
        function = functions[launch.kernel]
        values = (*map(value, launch.args), scratch if function.cubin.scratch else 0, 0)
        _launch(function, launch, values, stream)


def _launch(function: Function, launch: Launch, values: tuple[int | float, ...], stream: int) -> None:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * function.cubin.num_warps, 1, 1
    config.sharedMemBytes = function.cubin.shared
    config.hStream = stream
    if launch.overlapped:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    check(*driver.cuLaunchKernelEx(config, function.handle, (values, function.types), 0))
