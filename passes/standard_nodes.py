"""What the rewrites to standard ops make: nodes in place of one, and values that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name
from moecompiler.passes.rewiring import position_of

_SHARED = "standard-ops/"  # what the names of values begin with that are made once for a graph


def shared_values(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Those that an earlier run has made."""
    return {name: tensor for name, tensor in graph.tensors().items() if name.startswith(_SHARED)}


@dataclass
class Replacement:
    """The nodes that take the place of ``node``, each named after it, as ``restore`` names those of a body.

    ``shared``: by name, the values that are made once for the graph, by whichever replacement needs one first.
    """

    node: gs.Node
    shared: dict[str, gs.Tensor]
    nodes: list[gs.Node] = field(default_factory=list)

    def add(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: list[gs.Tensor],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """A standard operator with these outputs."""
        stem = self.node.name.rpartition("/")[2]
        name = node_name(module_of(self.node.name), f"{stem}.{len(self.nodes)}.{op}")
        self.nodes.append(gs.Node(op, name, dict(attributes or {}), list(inputs), outputs))

    def compute(
        self,
        name: str,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: Any,
        shape: Sequence[int | str],
        attributes: Mapping[str, Any] | None = None,
    ) -> gs.Variable:
        """A standard operator with one output, which gets the node's name and ``name``."""
        output = gs.Variable(f"{self.node.name}/{name}", dtype, list(shape))
        self.add(op, inputs, [output], attributes)
        return output

    def share(
        self,
        name: str,
        op: str,
        inputs: Sequence[gs.Tensor],
        dtype: Any,
        shape: Sequence[int | str],
        attributes: Mapping[str, Any] | None = None,
    ) -> gs.Tensor:
        """As ``compute``, but made once for the graph; ``name`` says all that it depends on."""
        key = f"{_SHARED}{name}"
        if key not in self.shared:
            self.shared[key] = gs.Variable(key, dtype, list(shape))
            self.add(op, inputs, [self.shared[key]], attributes)
        return self.shared[key]

    def integers(self, name: str, values: Sequence[int] | int) -> gs.Tensor:
        """A constant, int64, made once for the graph."""
        key = f"{_SHARED}{name}"
        return self.shared.setdefault(key, gs.Constant(key, np.array(values, np.int64)))

    def put(self, graph: gs.Graph) -> None:
        """Puts the nodes where the old one stands, which must have lost its outputs to them."""
        at = position_of(self.node, graph)
        graph.nodes[at : at + 1] = self.nodes
        self.node.inputs.clear()
