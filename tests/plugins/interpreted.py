"""Plans run by Triton's interpreter, on the CPU, in a process of its own: Triton looks at its environment when it is imported."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from moecompiler.plugins.launch import Argument, Dims, Input, Launch, Output, Tactic, Workspace
from moecompiler.plugins.tactics import tactics

_TYPES = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process that interprets kernels."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_start).result()
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _start() -> None:
    torch.set_num_threads(1)


def interpret(
    op: str,
    attributes: Mapping[str, Any],
    dtype: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor | int],
    tactic: Tactic | None = None,
    dims: Dims = (),
) -> list[torch.Tensor]:
    """Runs in the interpreter's process. An output is a tensor that is filled, or the index of the input it is aliased to.
    ``dims``: the inputs' shapes as the graph has them, where those of the tensors are others."""
    dims = dims or tuple(tuple(tensor.shape) for tensor in inputs)
    tactic = tactic or tactics(op, attributes, dims, dtype, 80)[0]
    results = [inputs[output] if isinstance(output, int) else output for output in outputs]
    # what nothing has written is not zero
    workspace = torch.full((tactic.workspace(dims) + 16,), 0x7F, dtype=torch.uint8)
    for launch in tactic.launches(dims):
        _launch(tactic, launch, inputs, results, workspace)
    return results


def _launch(
    tactic: Tactic,
    launch: Launch,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    workspace: torch.Tensor,
) -> None:
    kernel = tactic.kernels[launch.kernel]

    def value(argument: Argument, kind: str) -> Any:
        match argument:
            case Input(index):
                return inputs[index]
            case Output(index):
                return outputs[index]
            case Workspace(offset):
                kept = (len(workspace) - offset) // 16 * 16
                return workspace[offset : offset + kept].view(_TYPES[kind.partition(":")[0]])
        return argument

    function = getattr(importlib.import_module(kernel.module), kernel.function)
    arguments = {
        name: value(argument, kind) for (name, kind), argument in zip(kernel.signature, launch.args, strict=True)
    }
    constants = dict(kernel.constants)
    plain = {name: False for name in ("FAST", "NATIVE") if name in constants}  # what is PTX or the GPU's own otherwise
    function[launch.grid](**arguments, **constants | plain)
