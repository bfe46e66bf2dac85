"""An engine whose inputs and outputs are torch's tensors, for benchmarks: nothing is copied, and one run can follow another in a
CUDA graph on other memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorrt as trt
import torch

from moecompiler.backends.tensorrt_build import process_log
from moecompiler.runtime.device import Device, at_the_end
from moecompiler.tools.one_node import Engine


class TorchEngine:
    """Runs on torch's current device and stream; a context is made for each optimization profile that is used. They share one
    scratch memory: runs follow each other.

    Raises: RuntimeError where TensorRT refuses.
    """

    def __init__(self, engine: Engine):
        torch.cuda.synchronize()  # makes the context
        Device(torch.cuda.current_device())
        self.aliases, self._log = engine.aliases, process_log()
        self._tensorrt: dict[Any, Any] = {"runtime": trt.Runtime(self._log)}
        self.close = at_the_end(self, _let_go, self._tensorrt)
        self._tensorrt["engine"] = plan = self._tensorrt["runtime"].deserialize_cuda_engine(engine.plan.data)
        self._check(plan is not None)
        names = [plan.get_tensor_name(index) for index in range(plan.num_io_tensors)]
        self.inputs = [name for name in names if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._shapes: dict[tuple[int, str], tuple[int, ...]] = {}
        self._scratch = torch.empty(max(1, plan.device_memory_size_v2), dtype=torch.uint8, device="cuda")

    def run(self, profile: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Enqueues a run; ``tensors`` are all inputs and outputs, by the graph's names. They have to live until it has ended, and
        those of a captured run as long as its graph."""
        context = self._context(profile)
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            # a shape that is set is worked on at the next run, which cannot be part of a graph
            if name in self.inputs and self._shapes.get((profile, name)) != shape:
                self._check(context.set_input_shape(name, shape))
                self._shapes[profile, name] = shape
            self._check(context.set_tensor_address(name, tensor.data_ptr()))
        self._check(context.execute_async_v3(torch.cuda.current_stream().cuda_stream))

    def _context(self, profile: int) -> Any:
        if profile not in self._tensorrt:
            kind = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._tensorrt["engine"].create_execution_context(kind)
            self._check(context is not None)
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
            self._check(context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream))
            torch.cuda.synchronize()
            self._tensorrt[profile] = context
        return self._tensorrt[profile]

    def _check(self, done: bool) -> None:
        if not done:
            raise RuntimeError(f"TensorRT: {'; '.join(self._log.errors[-3:])}")


def _let_go(objects: dict[Any, Any]) -> None:
    """The last one first."""
    while objects:
        objects.popitem()
