"""One node of an op of ours as a TensorRT engine, as a plugin or as its body, run on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_build import Plan, build_plan, process_log
from moecompiler.backends.tensorrt_engine import TENSOR_TYPES
from moecompiler.backends.tensorrt_program import prepare
from moecompiler.graph import Program
from moecompiler.plugin_switches import parse_plugins
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.runtime.device import Buffer, Device, Stream, at_the_end
from moecompiler.tools.one_node_program import take_codes_as_bytes

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
_LIMITS = EngineLimits(1, 1, 2, 1)  # profiles are given outright


@dataclass(frozen=True)
class Engine:
    """A plan and what of it is written in place: output → input."""

    plan: Plan
    aliases: Mapping[str, str]


def build(program: Program, profiles: Sequence[Shapes], plugins: str, dtype: str, directory: Path) -> Engine:
    """``program``: all its initializers hold their data. ``plugins``: what ``--plugins`` would be given."""
    library, sm = TensorRTPlugins(), Device().info().sm
    prepared = prepare(program, BuildSettings(_LIMITS, parse_plugins(plugins)), dtype, sm, library)
    if prepared.plugins:
        take_codes_as_bytes(prepared.program.model)
    library.register()
    path = directory / "node.onnx"
    path.write_bytes(prepared.program.model.SerializeToString())
    names = [node.name for node in prepared.program.model.graph.node]
    plan = build_plan(path, profiles, names, [], bool(prepared.aliases), lambda fraction: None)
    return Engine(plan, prepared.aliases)


class Runner:
    """Runs an engine on given inputs."""

    def __init__(self, plan: Any, aliases: Mapping[str, str], profile: int = 0):
        self.device, self.stream, self.log, self.aliases = Device(), Stream(), process_log(), aliases
        self._tensorrt: dict[str, Any] = {"runtime": trt.Runtime(self.log)}
        # TensorRT's objects go before the stream they used, also when the interpreter ends
        self._release = at_the_end(self, _let_go, self._tensorrt)
        self._tensorrt["engine"] = self._tensorrt["runtime"].deserialize_cuda_engine(plan)
        assert self.engine is not None, self.log.errors
        self._tensorrt["context"] = self.engine.create_execution_context()
        self.context.set_optimization_profile_async(profile, self.stream.handle)
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    @property
    def engine(self) -> Any:
        return self._tensorrt["engine"]

    @property
    def context(self) -> Any:
        return self._tensorrt["context"]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs, poisoned before the run."""
        self.buffers: dict[str, Buffer] = {}
        for name, array in feeds.items():
            self.buffers[name] = Buffer(array.nbytes)
            self.stream.upload(self.buffers[name].pointer, np.ascontiguousarray(array))
            self.stream.synchronize()
            assert self.context.set_input_shape(name, array.shape), self.log.errors
            self.context.set_tensor_address(name, self.buffers[name].pointer)
        outputs = {}
        for name in self.names:
            if name in feeds:
                continue
            shape, dtype = tuple(self.context.get_tensor_shape(name)), TENSOR_TYPES[self.engine.get_tensor_dtype(name)]
            outputs[name] = np.full(shape, 0, dtype)
            if name in self.aliases:
                self.buffers[name] = self.buffers[self.aliases[name]]
            else:
                self.buffers[name] = Buffer(outputs[name].nbytes)
                poison = np.full(outputs[name].nbytes, 0xFF, np.uint8)
                self.stream.upload(self.buffers[name].pointer, poison)
                self.stream.synchronize()
            self.context.set_tensor_address(name, self.buffers[name].pointer)
        self._enqueue()
        for name, array in outputs.items():
            self.stream.download(array, self.buffers[name].pointer)
        self.stream.synchronize()
        return outputs

    def _enqueue(self) -> None:
        assert self.context.execute_async_v3(self.stream.handle), self.log.errors


def _let_go(objects: dict[str, Any]) -> None:
    """The last one first."""
    while objects:
        objects.popitem()
