"""``Barrier`` in a TensorRT engine: a copy, over which TensorRT's compiler does not look (``backends.tensorrt_barrier``).

``tensorrt`` is imported with this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorrt as trt

from moecompiler.backends.tensorrt_barrier import BARRIER
from moecompiler.graph import DOMAIN
from moecompiler.ops import VERSION, plugin_name
from moecompiler.runtime.device import checked, driver
from moecompiler.runtime.lifetime import never_freed

_BASES = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
_BYTES = 4


class Barrier(*_BASES):  # type: ignore[misc]
    """``x → y``, the same numbers: float32 of any shape."""

    def __init__(self) -> None:
        for base in _BASES:
            base.__init__(self)
        never_freed(self)  # see ``FusedOp``
        self.plugin_name, self.plugin_namespace, self.plugin_version = plugin_name(BARRIER), DOMAIN, str(VERSION)
        self.num_outputs = 1

    def get_capability_interface(self, kind: Any) -> Barrier:
        return self

    def clone(self) -> Barrier:
        return Barrier()

    def attach_to_context(self, context: Any) -> Barrier:
        return self.clone()

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [trt.DimsExprs(inputs[0])]

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        desc = in_out[position].desc
        return desc.format == trt.TensorFormat.LINEAR and desc.type == trt.DataType.FLOAT

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

    def get_fields_to_serialize(self) -> Any:
        self._collection = trt.PluginFieldCollection([])
        return self._collection

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> int:
        dims, count = input_desc[0].dims, _BYTES
        for axis in range(len(dims)):
            count *= dims[axis]
        checked(driver().cuMemcpyDtoDAsync(outputs[0], inputs[0], count, stream))
        return 0


class BarrierCreator(trt.IPluginCreatorV3One):
    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = plugin_name(BARRIER), DOMAIN, str(VERSION)
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Barrier:
        return Barrier()
