"""Backend ``onnxruntime``: engines are lowered ONNX files that ONNX Runtime runs on the CPU."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from moecompiler.atomic import temporary_path
from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.errors import UserError
from moecompiler.graph import Program, point_weights_at
from moecompiler.packing import pack
from moecompiler.runtime.communicator import current_communicator
from moecompiler.weights import TensorReader

# onnxruntime-extensions registers its ops without a lock: two ranks of one process that load at once crash it
_ONE_AT_A_TIME = threading.Lock()
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
}


class OnnxRuntimeBackend:
    """See ``base.Backend``."""

    name = "onnxruntime"

    def version(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}"

    def header(self) -> dict[str, Any]:
        return {}

    def identity(self, settings: BuildSettings) -> dict[str, Any]:
        return {}

    def notes(self, dtype: str, settings: BuildSettings) -> list[str]:
        """What a user should know of how a dtype is computed. Raises: UserError where plugins are insisted on."""
        if settings.plugins.insists:
            raise UserError(
                f"--plugins {settings.plugins}: backend onnxruntime has no plugins and runs every op's body;"
                " leave plugins at auto, or give --backend tensorrt"
            )
        if dtype == "bfloat16":
            return ["ONNX Runtime's CPU provider has few bfloat16 kernels: computes in float32 from bfloat16 weights"]
        return []

    def compute_dtype(self, dtype: str) -> str:
        return "float32" if dtype == "bfloat16" else dtype

    def build(
        self,
        program: Program,
        reader: TensorReader,
        stem: str,
        directory: Path,
        settings: BuildSettings,
        progress: Callable[[float], None],
    ) -> dict[str, Path]:
        """Writes ``stem.onnx`` and ``stem.safetensors`` under temporary names; one weight is in memory at a time."""
        model_name, weights_name = f"{stem}.onnx", f"{stem}.safetensors"
        staged = {name: temporary_path(directory / name) for name in (weights_name, model_name)}
        program = lower(program)
        pack([(staged[weights_name], program.weights)], reader, progress)
        model = point_weights_at(program, weights_name).model
        staged[model_name].write_bytes(model.SerializeToString(deterministic=True))
        return staged

    def load(
        self, directory: Path, stem: str, limits: EngineLimits, threads: int, device: int = 0
    ) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(open_session(directory / f"{stem}.onnx", threads), limits)


def open_session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Loads an engine file; collectives go through the communicator of the thread that runs it."""
    return open_model(str(path), onnxruntime.SessionOptions(), threads)


def open_part(model: onnx.ModelProto, directory: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """Loads a part of an engine file; its weights stay where they are, in ``directory``."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return open_model(model.SerializeToString(), options, threads)


def open_model(model: str | bytes, options: onnxruntime.SessionOptions, threads: int) -> onnxruntime.InferenceSession:
    """Loads a lowered model, a file's path or a file's bytes, with our operators."""
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # weights of 8 bits: its default multiplies by activations that it rounds to 8 bits too; this is float32
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    with _ONE_AT_A_TIME:
        options.register_custom_ops_library(_collectives_library())
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.cache
def _collectives_library() -> str:
    """Registers the Python ops, once per process, as onnxruntime-extensions wants it; returns its library's path."""
    with _hidden("torch", "transformers"):
        from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

    signature = {
        "inputs": [PyCustomOpDef.dt_float],
        "outputs": [PyCustomOpDef.dt_float],
        "attrs": {"group": PyCustomOpDef.dt_string},
    }

    @onnx_op(op_type="AllReduce", **signature)
    def all_reduce(x: np.ndarray, group: str) -> np.ndarray:
        return current_communicator().all_reduce(np.ascontiguousarray(x), _ranks(group))

    @onnx_op(op_type="AllGather", **signature)
    def all_gather(x: np.ndarray, group: str) -> np.ndarray:
        return current_communicator().all_gather(np.ascontiguousarray(x), _ranks(group))

    return get_library_path()


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """onnxruntime-extensions imports these, if it can, for converters that nobody calls here: seconds in every rank."""
    absent = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in absent:
            del sys.modules[package]


def _ranks(group: str) -> tuple[int, ...]:
    return tuple(int(rank) for rank in group.split(","))


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
