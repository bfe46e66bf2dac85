"""Programs with plugins and without, on each backend, as Polygraphy runners."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.comparison.runners import BodiesOnOnnxRuntime, OpenProgram
from moecompiler.errors import UserError
from moecompiler.graph import Program
from moecompiler.plugin_switches import PluginSwitches
from moecompiler.tools.backend import open_backend
from moecompiler.validation.place import Arrays
from moecompiler.weights import TensorReader

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner

_NO_LIMITS = EngineLimits(1, 1, 2, 1)  # what is not run as a stage has none


@dataclass(frozen=True)
class InterpretedPlugins:
    """Plugins by Triton's interpreter, all else as ``onnxruntime`` builds it. Files are made in a folder of ``directory``
    that goes with the runner."""

    reader: TensorReader
    switches: PluginSwitches
    directory: Path
    threads: int = 0

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        from polygraphy.backend.onnxrt import OnnxrtRunner

        from moecompiler.backends.onnxruntime import OnnxRuntimeBackend

        backend = open_backend("onnxruntime")
        assert isinstance(backend, OnnxRuntimeBackend)
        self.directory.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="program-", dir=self.directory))

        class Runner(OnnxrtRunner):  # type: ignore[misc]
            def deactivate_impl(self) -> None:
                super().deactivate_impl()
                shutil.rmtree(folder, ignore_errors=True)

        try:
            settings = BuildSettings(_NO_LIMITS, self.switches)
            built = backend.build(program, self.reader, "program", folder, settings, lambda fraction: None)
            for name, temporary in built.items():
                os.replace(temporary, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Runner(lambda: backend.open(folder / "program.onnx", self.threads), name="plugins")


def opener_of(
    backend: str, switches: PluginSwitches, reader: TensorReader, directory: Path, threads: int
) -> OpenProgram:
    """Raises: UserError where programs of a backend cannot be opened by themselves."""
    if backend == "onnxruntime":
        if switches.insists:
            return InterpretedPlugins(reader, switches, directory, threads)
        return BodiesOnOnnxRuntime(reader, threads)
    if backend == "tensorrt":
        from moecompiler.tools.comparison.tensorrt import TensorRTPrograms

        return TensorRTPrograms(reader, switches, directory)
    raise UserError(f"--backend {backend}: programs of it do not run here; compare engines of onnxruntime or tensorrt")


Opener = Callable[[TensorReader], OpenProgram]
