"""Engines of ONNX Runtime that also say which experts tokens are sent to."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeSession, open_part
from moecompiler.backends.onnxruntime_operators import Interpret, is_plugin

_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


class CountingSession(OnnxRuntimeSession):
    """``counts``: by layer, how many tokens each expert was chosen for, ``[experts]`` int64, padding included."""

    def __init__(
        self,
        model: onnx.ModelProto,
        directory: Path,
        limits: EngineLimits,
        threads: int,
        top_k: int,
        interpret: Interpret | None = None,
    ):
        routers = show_router_logits(model)
        super().__init__(open_part(model, directory, threads, interpret), limits)
        self._layers, self._top_k = list(routers), top_k
        self.counts: dict[int, np.ndarray] = {}

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """See ``StageSession.step``."""
        result = super().step(x, position_ids, last_token_ids, first)
        outputs = self._caches[first]
        kept = len(outputs) - len(self._layers)
        shown, self._caches[first] = outputs[kept:], outputs[:kept]
        for layer, logits in zip(self._layers, shown, strict=True):
            # every way of routing takes the largest logits (``routing``): they differ in the weights alone
            values = logits.numpy()
            chosen = np.argsort(-values, axis=-1, kind="stable")[:, : self._top_k]
            counted = np.bincount(chosen.ravel(), minlength=values.shape[-1])
            self.counts[layer] = self.counts.get(layer, 0) + counted
        return result


def load_counting(
    directory: Path, stem: str, limits: EngineLimits, threads: int, top_k: int, interpret: Interpret | None = None
) -> CountingSession:
    """As the backend's ``load``."""
    model = onnx.load(directory / f"{stem}.onnx", load_external_data=False)
    return CountingSession(model, directory, limits, threads, top_k, interpret)


def show_router_logits(model: onnx.ModelProto) -> dict[int, str]:
    """Adds to the model's outputs each layer's router logits ``[tokens, experts]``; their names, by layer, in their order."""
    names: dict[int, str] = {}
    for node in list(model.graph.node):
        layer = next((int(match[1]) for name in node.input if (match := _ROUTER.match(name))), None)
        if layer is None:
            continue
        if node.domain == "moecompiler" or is_plugin(node):  # a fused MoE: tokens and router are its first inputs
            names[layer] = f"{node.output[0]}/router_logits"
            transposed = f"{names[layer]}/router"
            model.graph.node.append(helper.make_node("Transpose", [node.input[1]], [transposed], perm=[1, 0]))
            model.graph.node.append(helper.make_node("MatMul", [node.input[0], transposed], [names[layer]]))
        elif node.op_type in ("Gemm", "MatMul"):
            names[layer] = node.output[0]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names.values())
    return names
