"""CUDA C++ to cubins by NVRTC, which comes with torch; nothing of the CUDA toolkit has to be installed."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from moecompiler.plugins.hopper.wgmma import wgmma_header
from moecompiler.plugins.launch import Cubin, CudaKernel

_HEADERS = ("ptx.cuh",)


@cache
def compile_cuda(kernel: CudaKernel, sm: int) -> Cubin:
    """Compiles for compute capability ``sm``, with the features that only this one has (``sm_90a``).

    Raises: RuntimeError with the compiler's words where a kernel does not compile: a defect of ours.
    """
    from cuda.bindings import nvrtc

    package, _, name = kernel.source.partition("/")
    source = resources.files(package).joinpath(name).read_bytes()
    here = resources.files("moecompiler.plugins.hopper")
    headers = {header: here.joinpath(header).read_bytes() for header in _HEADERS} | {"wgmma.cuh": wgmma_header()}
    options = [f"--gpu-architecture=sm_{sm}a", "-std=c++17", "-default-device", f"-DCOMPILE_{kernel.function}"]
    options += [f"-D{key}={int(value) if isinstance(value, bool) else value}" for key, value in kernel.constants]
    contents, names = list(headers.values()), [header.encode() for header in headers]
    program = _checked(None, nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), contents, names))
    try:
        encoded = [option.encode() for option in options]
        _checked(program, nvrtc.nvrtcCompileProgram(program, len(encoded), encoded))
        image = b" " * _checked(program, nvrtc.nvrtcGetCUBINSize(program))
        _checked(program, nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Cubin(image, kernel.function, kernel.shared, kernel.num_warps, 0)


def _checked(program: Any, result: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    status, *values = result
    if int(status):
        log = b""
        if program is not None:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: {status.name}\n{log.decode(errors='replace')}")
    return values[0] if values else None
