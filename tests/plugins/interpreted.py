"""Plans over torch tensors, run by Triton's interpreter; see ``moecompiler.plugins.interpreter``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moecompiler.plugins.interpreted import run
from moecompiler.plugins.interpreter import interpreter_pool
from moecompiler.plugins.launch import Dims, Tactic
from moecompiler.plugins.tactics import tactics

interpreter = interpreter_pool


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
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, results, [workspace])]
    run(tactic, tactic.launches(dims), addresses[0], addresses[1], addresses[2][0])
    return results
