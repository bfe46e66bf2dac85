"""Backend ``onnxruntime``: engines are lowered ONNX files that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from moecompiler.atomic import temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits, PluginLibrary
from moecompiler.backends.interpreted_node import INTERPRETED_SM
from moecompiler.backends.onnxruntime_interpreted import interpret_plugins
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.backends.onnxruntime_operators import (
    Interpret,
    InterpretingSession,
    find_weights,
    library,
    plugin_nodes,
)
from moecompiler.graph import Program, floating_type, point_weights_at
from moecompiler.packing import pack
from moecompiler.room import PROCESS
from moecompiler.weights import Recipe, TensorReader

# onnxruntime-extensions registers its ops without a lock: two ranks of one process that load at once crash it
_ONE_AT_A_TIME = threading.Lock()
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
}


class OnnxRuntimeBackend:
    """See ``base.Backend``. Plugins that are insisted on (``--plugins on``) are run by Triton's interpreter; else every op's
    body is."""

    name = "onnxruntime"

    def __init__(self, plugins: PluginLibrary | None = None):
        self._plugins = plugins

    def version(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}"

    def header(self) -> dict[str, Any]:
        return {}

    def identity(self, settings: BuildSettings) -> dict[str, Any]:
        if not settings.plugins.insists:
            return {}
        return {"plugins": str(settings.plugins), "tactics": settings.plugin_tactics, "sm": INTERPRETED_SM}

    def notes(self, dtype: str, settings: BuildSettings) -> list[str]:
        """What a user should know of how a dtype is computed. Raises: UserError where plugins are insisted on and there is no
        Triton."""
        notes = []
        if dtype == "bfloat16":
            notes.append(
                "ONNX Runtime's CPU provider has few bfloat16 kernels: computes in float32 from bfloat16 weights"
            )
        if settings.plugins.insists:
            self._library().check_interpreter()
            notes.append(
                f"--plugins {settings.plugins}: Triton's interpreter runs the plugins' kernels on the CPU, in {dtype}, as"
                f" planned for SM {INTERPRETED_SM // 10}.{INTERPRETED_SM % 10}; it is slow, and kernels in CUDA C++ are left out"
            )
        return notes

    def compute_dtype(self, dtype: str) -> str:
        return "float32" if dtype == "bfloat16" else dtype

    def build_memory(self, weights: Mapping[str, Recipe], settings: BuildSettings) -> int:
        """See ``base.Backend``: a weight is quantized whole, as float32 beside its codes and what is between."""
        largest = max((prod(each.quantized.source.shape) for each in weights.values() if each.quantized), default=0)
        return PROCESS + 3 * 4 * largest

    def shared_graph(self, program: Program, settings: BuildSettings) -> None:
        """Engines are graphs, each beside its weights: there is no plan to share."""

    def build_shared(
        self,
        program: Program,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        raise ValueError("backend onnxruntime has no plans that ranks share")

    def build(
        self,
        program: Program,
        reader: TensorReader,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
        shared: str | None = None,
    ) -> dict[str, Path]:
        """Writes ``stem.onnx`` and ``stem.safetensors`` under temporary names, where plugins are interpreted ``stem.engine.json``
        too; one weight is in memory at a time."""
        model_name, weights_name = f"{stem}.onnx", f"{stem}.safetensors"
        staged = {name: temporary_path(directory / name) for name in (weights_name, model_name)}
        record: dict[str, Any] = {}
        if settings.plugins.insists:
            interpreted = interpret_plugins(
                program,
                settings.plugins,
                floating_type(program),
                self._library(),
                weights_name,
                settings.plugin_tactics,
            )
            program, record = interpreted.program, interpreted.to_json()
        program = lower(program)
        pack([(staged[weights_name], program.weights)], reader, progress)
        model = point_weights_at(program, weights_name).model
        staged[model_name].write_bytes(model.SerializeToString(deterministic=True))
        if record:
            staged[f"{stem}.engine.json"] = temporary_path(directory / f"{stem}.engine.json")
            staged[f"{stem}.engine.json"].write_text(json.dumps(record, indent=1))
        return staged

    def load(
        self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0
    ) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(self.open(directory / f"{stem}.onnx", threads), limits)

    def open(self, path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
        """Loads an engine file. Raises: UserError where plugins are interpreted and there is no Triton."""
        return open_session(path, threads, self.interpret)

    def interpret(self, node: str, file: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See ``base.PluginLibrary``."""
        return self._library().interpret(node, file, arrays)

    def _library(self) -> PluginLibrary:
        if self._plugins is None:
            raise ValueError("backend onnxruntime was made without a plugin library, and plugins are asked for")
        return self._plugins


def open_session(path: Path, threads: int = 0, interpret: Interpret | None = None) -> onnxruntime.InferenceSession:
    """Loads an engine file; collectives go through the communicator of the thread that runs it, plugins through ``interpret``."""
    model = onnx.load(path, load_external_data=False)
    if plugin_nodes(model):
        return open_part(model, path.parent, threads, interpret)
    return open_model(str(path), onnxruntime.SessionOptions(), threads)


def open_part(
    model: onnx.ModelProto, directory: Path, threads: int = 0, interpret: Interpret | None = None
) -> onnxruntime.InferenceSession:
    """Loads a part of an engine file; its weights stay where they are, in ``directory``."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    part = onnx.ModelProto()
    part.CopyFrom(model)
    find_weights(part, directory)
    return open_model(part.SerializeToString(), options, threads, plugin_nodes(part), interpret)


def open_model(
    model: str | bytes,
    options: onnxruntime.SessionOptions,
    threads: int,
    plugins: Sequence[onnx.NodeProto] = (),
    interpret: Interpret | None = None,
) -> onnxruntime.InferenceSession:
    """Loads a lowered model, a file's path or a file's bytes, with our operators; ``plugins``: those of its nodes that
    ``interpret`` runs."""
    options.intra_op_num_threads = threads
    options.log_severity_level = 4 if plugins else 3  # where a plugin fails, what comes of it is no news
    # weights of 8 bits: its default multiplies by activations that it rounds to 8 bits too; this is float32
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if plugins and interpret is None:
        raise ValueError("the model has plugins, and nothing to interpret them with")
    with _ONE_AT_A_TIME:
        options.register_custom_ops_library(library(with_plugins=bool(plugins)))
        providers = ["CPUExecutionProvider"]
        if plugins and interpret is not None:
            return InterpretingSession(interpret, model, options, providers=providers)
        return onnxruntime.InferenceSession(model, options, providers=providers)


class OnnxRuntimeSession:
    """One rank's engine with its KV cache; see ``runtime.session.StageSession``.

    The cache stays in ONNX Runtime's own tensors, of each part of a batch by itself: what one step writes is bound as the next
    step's input.
    """

    def __init__(self, session: onnxruntime.InferenceSession, limits: EngineLimits):
        self.session = session
        self.max_batch_size, self.max_input_len = limits.max_batch_size, limits.max_input_len
        self.max_seq_len, self.vocab_size = limits.max_seq_len, limits.vocab_size
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._caches: dict[int, list[onnxruntime.OrtValue]] = {}  # by the first sequence of a part

    def start(self, batch: int) -> None:
        """The cache is empty: each part of the batch gets a zeroed one with its first step."""
        self._caches.clear()

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """See ``StageSession.step``."""
        binding = self.session.io_binding()
        main = "input_ids" if "input_ids" in self._inputs else "hidden_states"
        feeds = {main: x, "position_ids": position_ids, "last_token_ids": last_token_ids}
        for name, array in feeds.items():
            if name in self._inputs:
                wanted = _NUMPY_TYPES[self._inputs[name].type]
                binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=wanted))
        for name, cache in zip(self._cache_names, self._caches.get(first) or self._empty(len(x)), strict=True):
            binding.bind_ortvalue_input(name, cache)
        for name in self._outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        result, *self._caches[first] = binding.get_outputs()
        return self._last_logits(result.numpy(), last_token_ids)

    @property
    def _cache_names(self) -> list[str]:
        return [name for name in self._inputs if name.startswith("past_key_values.")]

    def _empty(self, batch: int) -> list[onnxruntime.OrtValue]:
        values = [self._inputs[name] for name in self._cache_names]
        arrays = [np.zeros((batch, *value.shape[1:]), _NUMPY_TYPES[value.type]) for value in values]
        return [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays]

    def _last_logits(self, result: np.ndarray, last_token_ids: np.ndarray) -> np.ndarray:
        """Hidden states as they are; logits float32 ``[B, vocab]``, picked here where the engine computes those of all tokens."""
        if self._outputs[0] != "logits":
            return result
        if result.ndim == 3:
            result = result[np.arange(len(result)), last_token_ids]
        return result.astype(np.float32)
