"""Programs as TensorRT engines of their own, built for the shapes that they are run on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import tensorrt as trt
from polygraphy.backend.base import BaseRunner

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.tensorrt_build import Profile, build_plan, process_log
from moecompiler.backends.tensorrt_engine import TENSOR_TYPES
from moecompiler.backends.tensorrt_messages import explain
from moecompiler.backends.tensorrt_program import Prepared, prepare, serialized
from moecompiler.errors import UserError
from moecompiler.graph import Program, floating_type
from moecompiler.packing import pack
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.plugins.library import TensorRTPlugins
from moecompiler.runtime.device import Buffer, Device, Stream, at_the_end
from moecompiler.runtime.weight_loading import load_weights
from moecompiler.tools.backend import tidy
from moecompiler.validation.place import Arrays
from moecompiler.validation.runners import ModuleRunner
from moecompiler.weights import Shape, TensorReader

_NO_LIMITS = EngineLimits(1, 1, 2, 1)  # profiles are given outright
_TIMED_RUNS = 10


@dataclass(frozen=True)
class TensorRTPrograms:
    """See ``comparison.runners.OpenProgram``. Files are made in a folder of ``directory`` that is gone when the runner is
    there."""

    reader: TensorReader
    switches: PluginSwitches
    directory: Path

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        library, sm = TensorRTPlugins(), Device().info().sm
        settings = BuildSettings(_NO_LIMITS, self.switches)
        prepared = prepare(program, settings, floating_type(program), sm, library, tidy)
        if prepared.plugins:
            library.register()
        profiles = profiles_of(program, examples)
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="program-", dir=self.directory))
        try:
            engine = self._build(prepared, profiles, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return PlanRunner(engine, examples[0])

    def _build(self, prepared: Prepared, profiles: list[Profile], folder: Path) -> PlanProgram:
        baked, bound = folder / "baked.safetensors", folder / "bound.safetensors"
        parts = [(baked, prepared.program.weights)] + ([(bound, prepared.bound)] if prepared.bound else [])
        pack(parts, self.reader, lambda fraction: None)
        path = folder / "program.onnx"
        path.write_bytes(serialized(prepared, baked.name))
        names = [node.name for node in prepared.program.model.graph.node]
        plan = build_plan(path, profiles, names, [], bool(prepared.aliases), lambda fraction: None)
        return PlanProgram(plan.data, prepared.aliases, load_weights(bound, prepared.bound), profiles)


def profiles_of(program: Program, examples: Sequence[Arrays]) -> list[Profile]:
    """One for each set of shapes among the examples, of the inputs with a free dimension, and made for these. Free they remain:
    TensorRT 10.6 does not build attention's plain operators for fixed shapes (``host_instr.cpp``: ``CHECK(0)``)."""
    free = {
        value.name: [not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim]
        for value in program.model.graph.input
    }
    free = {name: dims for name, dims in free.items() if any(dims)}
    shapes = dict.fromkeys(tuple((name, example[name].shape) for name in free) for example in examples)
    return [{name: _range(shape, free[name]) for name, shape in each} for each in shapes]


def _range(shape: Shape, free: Sequence[bool]) -> tuple[Shape, Shape, Shape]:
    """From 1 to twice of what there is."""
    least, most = (
        tuple(size if not open_ else bound for size, open_, bound in zip(shape, free, bounds, strict=True))
        for bounds in ([1] * len(shape), [2 * max(1, size) for size in shape])
    )
    return least, shape, most


class PlanProgram:
    """An engine on given inputs, bfloat16 as float32; ``seconds``: of one run of it, the inputs being there, for the last
    call."""

    def __init__(self, plan: Any, aliases: Mapping[str, str], weights: dict[str, Buffer], profiles: Sequence[Profile]):
        self._device, self._stream, self._log = Device(), Stream(), process_log()
        self._aliases, self._profiles = aliases, profiles
        self.seconds = 0.0
        # TensorRT's objects go before the stream they used, also when the interpreter ends
        self._held: dict[Any, Any] = {"weights": weights, "runtime": trt.Runtime(self._log)}
        self._release = at_the_end(self, _let_go, self._held)
        before = len(self._log.errors)
        self._held["engine"] = self._held["runtime"].deserialize_cuda_engine(plan)
        if self._held["engine"] is None:
            raise UserError(explain("cannot load the engine it built", self._log.errors[before:], ()))
        engine = self._held["engine"]
        # contexts never run at once
        self._scratch = Buffer(max(1, engine.device_memory_size_v2), "the engine's scratch memory")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        self._inputs = [name for name in names if name not in self._outputs and name not in weights]

    def close(self) -> None:
        """Gives all back."""
        self._release()

    def __call__(self, feeds: Arrays) -> Arrays:
        """Outputs in new arrays, poisoned before the run. Raises: RuntimeError where TensorRT refuses."""
        context, buffers = self._context(feeds), dict[str, Buffer]()
        for name in self._inputs:
            array = np.ascontiguousarray(feeds[name], self._dtype(name))
            buffers[name] = self._filled(array)
            self._check(context.set_input_shape(name, array.shape))
            self._check(context.set_tensor_address(name, buffers[name].pointer))
        found: dict[str, np.ndarray] = {}
        for name in self._outputs:
            found[name] = np.empty(tuple(context.get_tensor_shape(name)), self._dtype(name))
            if name in self._aliases:
                buffers[name] = buffers[self._aliases[name]]
            else:
                buffers[name] = self._filled(np.full(found[name].nbytes, 0xFF, np.uint8))
            self._check(context.set_tensor_address(name, buffers[name].pointer))
        self._run(context)
        for name, array in found.items():
            self._stream.download(array, buffers[name].pointer)
        self._stream.synchronize()
        begin = perf_counter()
        for _ in range(_TIMED_RUNS):
            self._run(context)
        self._stream.synchronize()
        self.seconds = (perf_counter() - begin) / _TIMED_RUNS
        return {name: _as_numpy(array) for name, array in found.items()}

    def _context(self, feeds: Arrays) -> Any:
        fits = (all(feeds[n].shape == typical for n, (_, typical, _) in each.items()) for each in self._profiles)
        index = next((i for i, fit in enumerate(fits) if fit), 0)
        if index not in self._held:
            context = self._held["engine"].create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise UserError(explain("cannot prepare to run the engine", self._log.errors[-1:], ()))
            self._held[index] = context
            context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
            self._check(context.set_optimization_profile_async(index, self._stream.handle))
            self._stream.synchronize()
            for name, buffer in self._held["weights"].items():
                self._check(context.set_tensor_address(name, buffer.pointer))
        return self._held[index]

    def _dtype(self, name: str) -> Any:
        return TENSOR_TYPES[self._held["engine"].get_tensor_dtype(name)]

    def _filled(self, array: np.ndarray) -> Buffer:
        buffer = Buffer(array.nbytes, "a program's values")
        self._stream.upload(buffer.pointer, array)
        self._stream.synchronize()
        return buffer

    def _run(self, context: Any) -> None:
        self._check(context.execute_async_v3(self._stream.handle))

    def _check(self, done: bool) -> None:
        if not done:
            raise RuntimeError(explain("cannot run the engine", self._log.errors[-1:], ()))


class PlanRunner(ModuleRunner):
    """A ``PlanProgram`` as a Polygraphy runner, whose time is the engine's own."""

    def __init__(self, program: PlanProgram, example: Arrays):
        super().__init__(program, {name: _as_numpy(array) for name, array in example.items()}, "tensorrt")
        self._program = program

    def infer_impl(self, feed_dict: Arrays) -> Any:
        outputs = super().infer_impl(feed_dict)
        self.inference_time = self._program.seconds
        return outputs

    def deactivate_impl(self) -> None:
        self._program.close()


def _as_numpy(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32: Polygraphy knows numpy's own types."""
    return array if array.dtype.kind in "fiub" and array.dtype.isbuiltin == 1 else array.astype(np.float32)


def _let_go(objects: dict[Any, Any]) -> None:
    """The last one first."""
    while objects:
        objects.popitem()
