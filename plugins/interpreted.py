"""Plans run by Triton's interpreter on the CPU: what ``driver`` is to the GPU. Only in processes of ``interpreter``'s."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moecompiler.plugins.launch import Argument, CudaKernel, Input, Kernel, Launch, Output, Tactic, TensorMap, Workspace

_OF_THE_GPU = (
    "FAST",
    "NATIVE",
    "OVERLAPPED",
)  # PTX, number formats and waiting for other launches: there is another way


@dataclass(frozen=True)
class Pointer:
    """What the interpreter takes for a tensor: an address, and Triton's name of what is there."""

    dtype: str
    address: int

    def data_ptr(self) -> int:
        return self.address


def run(
    tactic: Tactic, launches: Sequence[Launch], inputs: Sequence[int], outputs: Sequence[int], workspace: int
) -> None:
    """Runs a plan's launches one after another; all addresses are of this process's memory, at multiples of 16 bytes.

    Raises: ValueError where a kernel is no Triton kernel; triton.runtime.errors.InterpreterError where one fails.
    """
    for launch in launches:
        kernel = tactic.kernels[launch.kernel]
        if isinstance(kernel, CudaKernel):
            raise ValueError(f"{kernel.function} is CUDA C++, which is not interpreted")
        run_launch(kernel, launch, inputs, outputs, workspace)


def run_launch(kernel: Kernel, launch: Launch, inputs: Sequence[int], outputs: Sequence[int], workspace: int) -> None:
    """See ``run``."""

    def value(argument: Argument, kind: str) -> Any:
        name = kind.partition(":")[0].removeprefix("*")
        match argument:
            case Input(index):
                return Pointer(name, inputs[index])
            case Output(index):
                return Pointer(name, outputs[index])
            case Workspace(offset):
                return Pointer(name, workspace + offset)
            case TensorMap():
                raise ValueError(f"{kernel.function} takes a tensor map, which Triton's kernels do not")
        return argument

    function = getattr(importlib.import_module(kernel.module), kernel.function)
    arguments = {
        name: value(argument, kind) for (name, kind), argument in zip(kernel.signature, launch.args, strict=True)
    }
    constants = dict(kernel.constants)
    plain = {name: False for name in _OF_THE_GPU if name in constants}
    _grid_executor()(function.rewrite(), function.arg_names, launch.grid)(**arguments, **constants | plain)


@cache
def _grid_executor() -> Any:
    """The interpreter's, over memory that is where it is: its own copies each tensor's storage to the host and back."""
    from triton.runtime.interpreter import GridExecutor

    class InPlace(GridExecutor):
        def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
            return args, kwargs

        def _restore_args_dev(self, *args: Any) -> None:
            """There is nothing to bring back."""

    return InPlace
