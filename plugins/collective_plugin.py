"""``AllReduce`` and ``AllGather`` in a TensorRT engine: by the ways of the calling thread's communicator, and where it has none,
through the host. Which way a message goes is not the engine's business. ``tensorrt`` is imported with this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from moecompiler.graph import DOMAIN
from moecompiler.ops import VERSION, plugin_name
from moecompiler.runtime.communicator import current_communicator
from moecompiler.runtime.device_communicator import DeviceCommunicator
from moecompiler.runtime.host_way import HostWay
from moecompiler.runtime.lifetime import never_freed

_DTYPES = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16", trt.DataType.FLOAT: "float32"}
_BASES = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)


class Collective(*_BASES):  # type: ignore[misc]
    """``x → y`` over the ranks of ``group``: the sum, or all ``x`` along the last axis. While an engine is built there is nobody
    to talk to, and ``y`` is not computed (``talks``)."""

    def __init__(self, op: str, group: tuple[int, ...], talks: bool):
        for base in _BASES:
            base.__init__(self)
        never_freed(self)  # see ``FusedOp``
        self.plugin_name, self.plugin_namespace, self.plugin_version = plugin_name(op), DOMAIN, str(VERSION)
        self.num_outputs = 1
        self.op, self.group, self.talks = op, group, talks

    def get_capability_interface(self, kind: Any) -> Collective:
        return self

    def clone(self) -> Collective:
        return Collective(self.op, self.group, self.talks)

    def attach_to_context(self, context: Any) -> Collective:
        return self.clone()

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        shape = trt.DimsExprs(inputs[0])
        if self.op == "AllGather":
            last, count = len(shape) - 1, builder.constant(len(self.group))
            shape[last] = builder.operation(trt.DimensionOperation.PROD, shape[last], count)
        return [shape]

    def supports_format_combination(self, position: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        desc = in_out[position].desc
        return desc.format == trt.TensorFormat.LINEAR and desc.type in _DTYPES and desc.type == in_out[0].desc.type

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
        self._array = np.array(self.group, np.int32)
        self._talks = np.array([1], np.int32)
        kind = trt.PluginFieldType.INT32
        self._fields = [trt.PluginField("group", self._array, kind), trt.PluginField("talks", self._talks, kind)]
        self._collection = trt.PluginFieldCollection(self._fields)
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
        if not self.talks:
            return 0
        communicator, dims, dtype = current_communicator(), input_desc[0].dims, _DTYPES[input_desc[0].type]
        shape = [dims[axis] for axis in range(len(dims))]
        ways: DeviceCommunicator = communicator.device or HostWay(communicator)
        if self.op == "AllReduce":
            ways.all_reduce(inputs[0], outputs[0], math.prod(shape), dtype, self.group, stream)
        else:
            rows, columns = math.prod(shape[:-1]), shape[-1]
            ways.all_gather(inputs[0], outputs[0], rows, columns, dtype, self.group, stream)
        return 0


class CollectiveCreator(trt.IPluginCreatorV3One):
    """Makes a collective from a node's ``group``, or from what an engine kept."""

    def __init__(self, op: str):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = plugin_name(op), DOMAIN, str(VERSION)
        self._op = op
        self._fields = [trt.PluginField("group", np.array([], np.int32), trt.PluginFieldType.INT32)]
        self.field_names = trt.PluginFieldCollection(self._fields)

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Collective:
        data = {field.name: np.array(field.data, copy=True).reshape(-1).tolist() for field in fields}
        return Collective(self._op, tuple(data["group"]), "talks" in data)
