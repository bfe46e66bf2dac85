"""``Barrier`` in a TensorRT engine: a copy, over which TensorRT's compiler does not look (``backends.tensorrt_barrier``).

``tensorrt`` is imported with this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorrt as trt

from moecompiler.backends.tensorrt_barrier import BARRIER
from moecompiler.graph import DOMAIN
from moecompiler.ops import VERSION, plugin_name
from moecompiler.plugins.one_way_plugin import OneWay, shape_of
from moecompiler.runtime.device import checked, driver

_BYTES = 4


class Barrier(OneWay):
    """``x → y``, the same numbers: float32 of any shape."""

    types = (trt.DataType.FLOAT,)

    def __init__(self) -> None:
        OneWay.__init__(self, BARRIER)

    def clone(self) -> Barrier:
        return Barrier()

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
        count = _BYTES * math.prod(shape_of(input_desc[0]))
        checked(driver().cuMemcpyDtoDAsync(outputs[0], inputs[0], count, stream))
        return 0


class BarrierCreator(trt.IPluginCreatorV3One):
    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = plugin_name(BARRIER), DOMAIN, str(VERSION)
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Barrier:
        return Barrier()
