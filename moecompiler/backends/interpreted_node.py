"""A node whose kernels are interpreted, as text: what its operator in an engine file says to the process that interprets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moecompiler.weights import Shape

INTERPRETED_SM = 80
"""The compute capability whose plans are interpreted: on it all kernels are Triton's, none CUDA C++."""


@dataclass(frozen=True)
class FileWeight:
    """A weight that stays in its file: the tensor's name there, and its shape and dtype in the graph."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class InterpretedNode:
    """``dtype``: of the node's own floating-point type, in which its kernels compute; ``tactic``: which of the op's plans.
    ``weights``: by input, those that come from the file; the others come with each call, in order."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    dtype: str
    tactic: str
    weights: Mapping[int, FileWeight] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> InterpretedNode:
        data = json.loads(text)
        weights = {
            int(index): FileWeight(each["name"], each["dtype"], tuple(each["shape"]))
            for index, each in data.pop("weights").items()
        }
        return InterpretedNode(**data, weights=weights)
