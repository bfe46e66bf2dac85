"""Kernels to cubins, for any SM, with or without a GPU: Triton's by Triton, CUDA C++'s by NVRTC."""

from __future__ import annotations

import importlib
from typing import Any

from moecompiler.plugins.launch import AnyKernel, Cubin, CudaKernel, Kernel


def compile_kernel(kernel: AnyKernel, sm: int) -> Cubin:
    """Compiles for compute capability ``sm`` (90 for 9.0). Triton keeps what it has compiled in its own cache.

    Raises: whatever the compiler raises where a kernel does not compile: that is a defect of ours, not of the input.
    """
    if isinstance(kernel, CudaKernel):
        from moecompiler.plugins.hopper.compile import compile_cuda

        return compile_cuda(kernel, sm)
    return _compile_triton(kernel, sm)


def _compile_triton(kernel: Kernel, sm: int) -> Cubin:
    import triton
    from triton.backends.compiler import GPUTarget

    function = getattr(importlib.import_module(kernel.module), kernel.function)
    types = dict(kernel.signature)
    constants = dict(kernel.constants)
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in function.arg_names}
    if set(types) | set(constants) != set(signature):
        raise ValueError(f"{kernel.function} takes {sorted(signature)}, not {sorted({*types, *constants})}")
    multiples = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if types.get(name, "").endswith(":16")
    }
    source = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=constants, attrs=multiples)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    about: Any = compiled.metadata
    return Cubin(compiled.asm["cubin"], about.name, about.shared, about.num_warps, about.global_scratch_size)
