"""Element types of tensors in onnx-graphsurgeon's graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from moecompiler.graph import module_of, node_name


def onnx_dtype(tensor: gs.Tensor) -> int | None:
    """A tensor's ONNX type; graphsurgeon holds a numpy dtype, or the ONNX type itself where numpy has none."""
    if tensor.dtype is None or isinstance(tensor.dtype, int):
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def cast_like(tensor: gs.Tensor, like: gs.Tensor, graph: gs.Graph, name: str) -> gs.Tensor:
    """``tensor`` in the type of ``like``: itself, or what a new node ``name`` gives."""
    if onnx_dtype(tensor) == onnx_dtype(like):
        return tensor
    cast = gs.Variable(f"{name}_output", like.dtype, tensor.shape)
    graph.nodes.append(gs.Node("Cast", name, {"to": onnx_dtype(like)}, [tensor], [cast]))
    return cast


def written_like(y: gs.Tensor, like: gs.Tensor, graph: gs.Graph, node: str) -> gs.Tensor:
    """What a node of the type of ``like`` has to write so that ``y`` is written: ``y`` itself, or the input of a new cast,
    named after ``node``."""
    if onnx_dtype(y) == onnx_dtype(like):
        return y
    written = gs.Variable(f"{node}_output", like.dtype, y.shape)
    name = node_name(module_of(node), f"Cast_{node.rpartition('_')[2]}")
    graph.nodes.append(gs.Node("Cast", name, {"to": onnx_dtype(y)}, [written], [y]))
    return written
