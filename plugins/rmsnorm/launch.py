"""Plans of ``RMSNorm``, ``AddRMSNorm`` and ``AllReduceAddRMSNorm``: one kernel, one program per row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moecompiler.plugins.launch import TRITON_TYPES, Dims, Input, Kernel, Launch, Output

_MODULE = "moecompiler.plugins.rmsnorm.kernels"


@dataclass(frozen=True)
class RowsTactic:
    """``tensors`` are the node's inputs and outputs in the order of the kernel's pointers."""

    kernel: Kernel
    tensors: tuple[Input | Output, ...]
    epsilon: float
    name: str = "rows"

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (self.kernel,)

    def workspace(self, dims: Dims) -> int:
        return 0

    def launches(self, dims: Dims) -> tuple[Launch, ...]:
        rows = math.prod(dims[0][:-1])
        return (Launch(0, (rows, 1, 1), (*self.tensors, self.epsilon)),) if rows else ()


def tactics(op: str, attributes: Mapping[str, Any], dims: Dims, dtype: str, sm: int) -> tuple[RowsTactic, ...]:
    """``op``: ``RMSNorm`` or ``AddRMSNorm``, or ``AllReduceAddRMSNorm`` once its branch has been added up. Of ``dims`` only the
    last one of the first input has to be known."""
    hidden = dims[0][-1]
    block = 1 << (hidden - 1).bit_length()
    added = op != "RMSNorm"
    names = ("residual", "branch", "weight", "y", "x") if added else ("x", "weight", "y")
    inputs = 3 if added else 2
    pointer = f"*{TRITON_TYPES[dtype]}:16"
    kernel = Kernel(
        _MODULE,
        "add_rms_norm" if added else "rms_norm",
        (*((name, pointer) for name in names), ("epsilon", "fp32")),
        (("HIDDEN", hidden), ("BLOCK", block)),
        num_warps=min(16, max(4, block // 512)),
    )
    tensors: tuple[Input | Output, ...] = (
        *(Input(i) for i in range(inputs)),
        *(Output(i) for i in range(len(names) - inputs)),
    )
    return (RowsTactic(kernel, tensors, attributes["epsilon"]),)
