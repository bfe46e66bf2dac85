"""A program whose nodes of ops of ours are plugins, run by Triton's interpreter, as a Polygraphy runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from moecompiler.backends.base import PluginLibrary
from moecompiler.backends.onnxruntime import open_session
from moecompiler.backends.onnxruntime_interpreted import interpret_plugins
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.graph import ONNX_DTYPES, Program, floating_type, point_weights_at
from moecompiler.packing import pack
from moecompiler.plugin_switches import PluginSwitches, parse_plugins
from moecompiler.validation.place import Arrays
from moecompiler.weights import TensorReader

_ON = parse_plugins("on")
_WEIGHTS, _MODEL = "program.safetensors", "program.onnx"


class InterpretedPlugins:
    """See ``runners.OpenProgram``. ``tactics``: names of plans, see ``interpret_plugins``; ``switches``: which nodes are
    plugins."""

    def __init__(
        self,
        reader: TensorReader,
        library: PluginLibrary,
        threads: int = 0,
        tactics: Sequence[str] = (),
        switches: PluginSwitches = _ON,
    ):
        self._reader, self._library, self._threads = reader, library, threads
        self._tactics, self._switches = tactics, switches

    def __call__(self, program: Program, examples: Sequence[Arrays]) -> BaseRunner:
        """Raises: UserError where a node has no plugin whose kernels can be interpreted, or there is no Triton."""
        self._library.check_interpreter()
        made = interpret_plugins(
            program, self._switches, _dtype(program), self._library, _WEIGHTS, self._tactics
        ).program
        lowered = lower(made)
        folder = TemporaryDirectory(prefix="moecompiler-interpreted-")
        directory = Path(folder.name)
        pack([(directory / _WEIGHTS, lowered.weights)], self._reader)
        data = point_weights_at(lowered, _WEIGHTS).model.SerializeToString(deterministic=True)
        (directory / _MODEL).write_bytes(data)
        return _Runner(folder, self._library, self._threads)


class _Runner(OnnxrtRunner):
    """Its files go with it."""

    def __init__(self, folder: TemporaryDirectory[str], library: PluginLibrary, threads: int):
        path = Path(folder.name) / _MODEL
        super().__init__(lambda: open_session(path, threads, library.interpret), name="plugins")
        self._folder = folder

    def deactivate_impl(self) -> None:
        del self.sess
        self._folder.cleanup()


def _dtype(program: Program) -> str:
    """Of a node alone, that of its first input: a graph's inputs are in order of their names."""
    graph = program.model.graph
    if len(graph.node) != 1:
        return floating_type(program)
    names = {code: name for name, code in ONNX_DTYPES.items()}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    return names[types[graph.node[0].input[0]]]
