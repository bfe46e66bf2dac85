"""CUDA C++ to cubins by NVRTC, which comes with torch; nothing of the CUDA toolkit has to be installed."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from moecompiler.plugins.hopper.wgmma import wgmma_header
from moecompiler.plugins.launch import Cubin, CudaKernel


def compile_cuda(kernel: CudaKernel, sm: int) -> Cubin:
    """Compiles for compute capability ``sm``, from 9.0 on with the features that only this one has (``sm_90a``).

    Raises: RuntimeError with the compiler's words where a kernel does not compile: a defect of ours.
    """
    return Cubin(compile_image(kernel, sm)[0], kernel.function, kernel.shared, kernel.num_warps, 0)


@cache
def compile_image(kernel: CudaKernel, sm: int) -> tuple[bytes, str]:
    """The cubin, and what the assembler says of it: registers, and spills if there are any; nothing where NVRTC found the kernel
    in its cache. Raises: as ``compile_cuda``."""
    from cuda.bindings import nvrtc

    package, _, name = kernel.source.partition("/")
    source = resources.files(package).joinpath(name).read_bytes()
    headers = _headers("moecompiler.plugins.hopper") | _headers(package) | {"wgmma.cuh": wgmma_header()}
    own = "a" if sm >= 90 else ""
    options = [f"--gpu-architecture=sm_{sm}{own}", "-std=c++17", "-default-device", "--ptxas-options=-v"]
    options += [f"-DCOMPILE_{kernel.function}"]
    options += [f"-D{key}={int(value) if isinstance(value, bool) else value}" for key, value in kernel.constants]
    contents, names = list(headers.values()), [header.encode() for header in headers]
    program = _checked(None, nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), contents, names))
    try:
        encoded = [option.encode() for option in options]
        _checked(program, nvrtc.nvrtcCompileProgram(program, len(encoded), encoded))
        image = bytearray(_checked(program, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(program, nvrtc.nvrtcGetCUBIN(program, image))
        return bytes(image), _log(program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _headers(package: str) -> dict[str, bytes]:
    files = resources.files(package).iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith(".cuh")}


def _checked(program: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise RuntimeError(f"NVRTC: {status.name}\n{_log(program) if program is not None else ''}")
    return values[0] if values else None


def _log(program: Any) -> str:
    from cuda.bindings import nvrtc

    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    # Not bytes, though NVRTC's Python examples have it so: an empty log is one byte, its end, and b" " * 1 is the one space that
    # all of Python shares.
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.replace(b"\0", b"").decode(errors="replace").strip()
