"""What passes share when they change a graph."""

from __future__ import annotations

import onnx_graphsurgeon as gs

# ops that give something else each time they run: never folded, never merged
NOT_PURE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


def redirect_readers(old: gs.Tensor, new: gs.Tensor) -> None:
    """Makes every node that reads ``old`` read ``new``."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]
