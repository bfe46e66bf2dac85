"""The opset that ONNX's own attention and norms came with, and graphs raised to it."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from moecompiler.graph import OPSET

STANDARD_OPSET = 24  # Attention, RMSNormalization and RotaryEmbedding are of 23, TensorScatter of 24
STANDARD_IR_VERSION = 12  # what onnx asks for at opset 24


def wrong_opset(graph: gs.Graph) -> str | None:
    """Why a graph cannot be raised; None where it can. Of the operators that opset 21 has, those that changed by 24 got types
    and optional attributes, whose defaults leave their meaning."""
    if OPSET <= graph.opset <= STANDARD_OPSET:
        return None
    return f"the graph is of opset {graph.opset}, not {OPSET} to {STANDARD_OPSET}"


def raise_opset(graph: gs.Graph) -> None:
    """Declares the graph and the functions in it to be of the new opset: a file may not mix them."""
    graph.ir_version = max(graph.ir_version or 0, STANDARD_IR_VERSION)
    for each in (graph, *graph.functions):
        each.opset = STANDARD_OPSET
        # new entries: those that are there belong to the model that the graph was read from
        others = [imported for imported in each.import_domains or () if imported.domain not in ("", "ai.onnx")]
        each.import_domains = [onnx.helper.make_opsetid("", STANDARD_OPSET), *others]
