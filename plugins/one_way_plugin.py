"""What plugins have in common that have one input, one output of its type and one way to compute it.

``tensorrt`` is imported with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import tensorrt as trt

from moecompiler.graph import DOMAIN
from moecompiler.ops import VERSION, plugin_name
from moecompiler.runtime.lifetime import never_freed

_BASES = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)


class OneWay(*_BASES):  # type: ignore[misc]
    """A node of ``op``; ``clone``, ``get_fields_to_serialize`` and ``enqueue`` are its own. ``types``: those that it takes."""

    types: ClassVar[tuple[Any, ...]]

    def __init__(self, op: str):
        for base in _BASES:
            base.__init__(self)
        never_freed(self)  # see ``FusedOp``
        self.plugin_name, self.plugin_namespace, self.plugin_version = plugin_name(op), DOMAIN, str(VERSION)
        self.num_outputs = 1

    def get_capability_interface(self, kind: Any) -> OneWay:
        return self

    def attach_to_context(self, context: Any) -> OneWay:
        return self.clone()

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [trt.DimsExprs(inputs[0])]

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        desc = in_out[position].desc
        return desc.format == trt.TensorFormat.LINEAR and desc.type in self.types and desc.type == in_out[0].desc.type

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing depends on shapes."""

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Nothing depends on shapes."""

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        """There is one way."""


def shape_of(desc: Any) -> list[int]:
    """A tensor's shape, of its description when the engine runs."""
    return [desc.dims[axis] for axis in range(len(desc.dims))]
