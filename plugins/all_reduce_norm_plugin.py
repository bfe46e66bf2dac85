"""``AllReduceAddRMSNorm`` as a plugin: a fused op whose ranks exchange something. ``tensorrt`` is imported with this module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moecompiler.plugins.fields import Baked
from moecompiler.plugins.launch import ALIGNMENT
from moecompiler.plugins.library import PluginOp
from moecompiler.plugins.one_way_plugin import shape_of
from moecompiler.plugins.tensorrt_plugin import Creator, FusedOp, Modules
from moecompiler.runtime.communicator import current_communicator
from moecompiler.runtime.device_communicator import BYTES, DeviceCommunicator
from moecompiler.runtime.host_way import HostWay


class AllReduceNorm(FusedOp):
    """A node of ``AllReduceAddRMSNorm``: in one launch where ranks have a way that does it all, else an all-reduce by whichever
    way and the kernel of ``AddRMSNorm``. While an engine is built there is nobody to talk to, and the branch is taken for the
    sum (``talks``)."""

    def __init__(self, op: PluginOp, baked: Baked, modules: Modules, talks: bool):
        FusedOp.__init__(self, op, baked, modules)
        self.talks = talks

    def clone(self) -> AllReduceNorm:
        return AllReduceNorm(self.op, self.baked, self.modules, self.talks)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """The sum lies before what the kernel needs."""
        branch = [inputs[1].max[axis] for axis in range(len(inputs[1].max))]
        return _room(branch, self.baked.dtype) + FusedOp.get_workspace_size(self, inputs, outputs)

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
            return FusedOp.enqueue(self, input_desc, output_desc, inputs, outputs, workspace, stream)
        communicator, dtype, attributes = current_communicator(), self.baked.dtype, self.baked.attributes
        shape = shape_of(input_desc[1])
        rows, hidden, group = math.prod(shape[:-1]), shape[-1], tuple(attributes["group"])
        ways = communicator.device
        norming = ways.norming(rows, hidden, dtype, group) if ways is not None else None
        if norming is not None:
            read, written = (inputs[0], inputs[1], inputs[2]), (outputs[0], outputs[1])
            epsilon = attributes["epsilon"]
            norming.all_reduce_add_rms_norm(read, written, rows, hidden, epsilon, dtype, group, stream)
            return 0
        way: DeviceCommunicator = ways or HostWay(communicator)
        way.all_reduce(inputs[1], workspace, rows * hidden, dtype, group, stream)
        behind, read_summed = workspace + _room(shape, dtype), [inputs[0], workspace, inputs[2]]
        return FusedOp.enqueue(self, input_desc, output_desc, read_summed, outputs, behind, stream)


def _room(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a part of the workspace that holds such a tensor."""
    return -(-math.prod(shape) * BYTES[dtype] // ALIGNMENT) * ALIGNMENT


class ExchangingCreator(Creator):
    """Makes plugins of ops in which ranks exchange something: those that an engine kept talk to others."""

    def _made(self, baked: Baked, runs: bool) -> FusedOp:
        return AllReduceNorm(self._op, baked, self._modules, runs)
