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
from moecompiler.plugins.one_way_plugin import OneWay, shape_of
from moecompiler.runtime.communicator import current_communicator
from moecompiler.runtime.device_communicator import DeviceCommunicator
from moecompiler.runtime.host_way import HostWay

_DTYPES = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16", trt.DataType.FLOAT: "float32"}


class Collective(OneWay):
    """``x → y`` over the ranks of ``group``: the sum, or all ``x`` along the last axis. While an engine is built there is nobody
    to talk to, and ``y`` is not computed (``talks``)."""

    types = tuple(_DTYPES)

    def __init__(self, op: str, group: tuple[int, ...], talks: bool):
        OneWay.__init__(self, op)
        self.op, self.group, self.talks = op, group, talks

    def clone(self) -> Collective:
        return Collective(self.op, self.group, self.talks)

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        shape = trt.DimsExprs(inputs[0])
        if self.op == "AllGather":
            last, count = len(shape) - 1, builder.constant(len(self.group))
            shape[last] = builder.operation(trt.DimensionOperation.PROD, shape[last], count)
        return [shape]

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
        communicator, shape, dtype = current_communicator(), shape_of(input_desc[0]), _DTYPES[input_desc[0].type]
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
