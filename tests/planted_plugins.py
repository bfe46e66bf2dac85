"""Wrong plugins, planted where backend onnxruntime calls Triton's interpreter: what looks for them has to name exactly these.

Each is wrong in one node, and there for one shape, one expert or one slot alone, as a kernel is whose tiles or bounds are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moecompiler.backends.interpreted_node import InterpretedNode
from moecompiler.plugins.library import TensorRTPlugins

Arrays = list[np.ndarray]


class Bug(Protocol):
    """``node``: the name of the node that is wrong."""

    @property
    def node(self) -> str: ...

    def spoil(self, inputs: Sequence[np.ndarray], outputs: Arrays) -> Arrays:
        """What comes instead of ``outputs``; ``inputs``: but for weights that stay in their file."""


@dataclass(frozen=True)
class PlantedPlugins(TensorRTPlugins):
    bug: Bug

    def interpret(self, node: str, file: str, arrays: Sequence[np.ndarray]) -> Arrays:
        outputs = super().interpret(node, file, arrays)
        if InterpretedNode.from_json(node).name != self.bug.node:
            return outputs
        return self.bug.spoil(arrays, [array.copy() for array in outputs])


@dataclass(frozen=True)
class WrongForTokens:
    """A MoE that leaves out the last token's results where there are so many: a grid that is one program short."""

    node: str
    tokens: int

    def spoil(self, inputs: Sequence[np.ndarray], outputs: Arrays) -> Arrays:
        if len(inputs[0]) == self.tokens:
            outputs[0][-1] = 0
        return outputs


@dataclass(frozen=True)
class WrongExpert:
    """A MoE whose tokens of one expert come out half as large again."""

    node: str
    expert: int

    def spoil(self, inputs: Sequence[np.ndarray], outputs: Arrays) -> Arrays:
        x, router = inputs[:2]
        chosen = np.argsort(-(x @ router.T), axis=-1)[:, :2]
        outputs[0][(chosen == self.expert).any(-1)] *= 1.5
        return outputs


@dataclass(frozen=True)
class ForgetsSlot:
    """An attention that does not write the keys of the cache's slot ``slot`` (counted from the end, if negative)."""

    node: str
    slot: int

    def spoil(self, inputs: Sequence[np.ndarray], outputs: Arrays) -> Arrays:
        slot = range(outputs[1].shape[2])[self.slot]
        if (inputs[5] == slot).any():
            outputs[1][:, :, slot] = inputs[6][:, :, slot]
            outputs[0][:] *= 0.9
        return outputs
