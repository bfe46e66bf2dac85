"""What passes share when they change a graph."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs

# ops that give something else each time they run: never folded, never merged
NOT_PURE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


def is_any_of(tensor: gs.Tensor, tensors: Iterable[gs.Tensor]) -> bool:
    """Whether it is one of them; onnx-graphsurgeon's own equality goes by name."""
    return any(tensor is each for each in tensors)


def position_of(node: gs.Node, graph: gs.Graph) -> int:
    """Where a node stands; ``list.index`` would compare whole nodes, which takes a deep model's time."""
    return next(index for index, each in enumerate(graph.nodes) if each is node)


def redirect_readers(old: gs.Tensor, new: gs.Tensor) -> None:
    """Makes every node that reads ``old`` read ``new``."""
    for reader in list(old.outputs):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]
