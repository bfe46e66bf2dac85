"""The Python operators of engines of ONNX Runtime: collectives, and plugins whose kernels are interpreted.

onnxruntime-extensions knows neither float16 nor bfloat16 in Python operators: floats come and go as float32. An exception would
end the process: what a plugin's operator raises is kept until ONNX Runtime returns.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from moecompiler.runtime.communicator import current_communicator

CUSTOM_OPS_DOMAIN = "ai.onnx.contrib"
PLUGIN = "Plugin_"
"""In the names of plugins' operators, before the types of their inputs and outputs."""
NODE, FILE = "node", "file"
"""Attributes of a plugin's operator: ``InterpretedNode`` as text, and the file of its weights."""

Interpret = Callable[[str, str, Sequence[np.ndarray]], list[np.ndarray]]
"""See ``base.PluginLibrary.interpret``."""

_TYPES: dict[str, type] = {"f": np.float32, "l": np.int64, "b": np.int8}


def plugin_operator(op: str, inputs: Iterable[type], outputs: Iterable[type]) -> str:
    """The name of an op's operator: numpy types of its inputs and outputs, all of ``float32``, ``int64`` or ``int8``."""
    letters = {kind: letter for letter, kind in _TYPES.items()}
    return f"{op}{PLUGIN}{''.join(map(letters.__getitem__, inputs))}_{''.join(map(letters.__getitem__, outputs))}"


def is_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node of an engine file is a plugin's operator."""
    return node.domain == CUSTOM_OPS_DOMAIN and PLUGIN in node.op_type


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if is_plugin(node)]


def find_weights(model: onnx.ModelProto, directory: Path) -> None:
    """Tells plugins' operators, in place, where the file of their weights is: they know its name alone. With it goes what
    changes when another file takes its place."""
    for node in plugin_nodes(model):
        for attribute in node.attribute:
            if attribute.name == FILE and attribute.s:
                path = (directory / attribute.s.decode()).resolve()
                about = path.stat()
                attribute.s = f"{path}|{about.st_ino}|{about.st_mtime_ns}".encode()


@dataclass
class _Run:
    """What the operators of the run at hand call, and what went wrong there."""

    interpret: Interpret
    failure: BaseException | None = None


_RUN: ContextVar[_Run | None] = ContextVar("run", default=None)


class InterpretingSession(onnxruntime.InferenceSession):
    """A session some of whose nodes are interpreted. ONNX Runtime calls operators on the thread that runs it."""

    def __init__(self, interpret: Interpret, *args: Any, **kwargs: Any):
        self._interpret = interpret
        super().__init__(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """See ``onnxruntime.InferenceSession``. Raises: what interpreting raised."""
        with self._running():
            return super().run(*args, **kwargs)

    def run_with_iobinding(self, *args: Any, **kwargs: Any) -> None:
        """See ``onnxruntime.InferenceSession``. Raises: what interpreting raised."""
        with self._running():
            super().run_with_iobinding(*args, **kwargs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        run = _Run(self._interpret)
        token = _RUN.set(run)
        try:
            yield
        except Exception:  # of ONNX Runtime, over what came in place of a result
            if run.failure is None:
                raise
        finally:
            _RUN.reset(token)
        if run.failure is not None:
            raise run.failure


def library(operators: Iterable[str]) -> str:
    """Registers collectives and these operators of plugins, each once per process, as onnxruntime-extensions wants it; returns
    its library's path."""
    path = _collectives()
    for name in operators:
        _plugin(name)
    return path


@functools.cache
def _collectives() -> str:
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


@functools.cache
def _plugin(name: str) -> None:
    from onnxruntime_extensions import PyCustomOpDef, onnx_op

    codes = {"f": PyCustomOpDef.dt_float, "l": PyCustomOpDef.dt_int64, "b": PyCustomOpDef.dt_int8}
    inputs, outputs = name.rpartition(PLUGIN)[2].split("_")
    text = PyCustomOpDef.dt_string

    @onnx_op(
        op_type=name,
        inputs=[codes[letter] for letter in inputs],
        outputs=[codes[letter] for letter in outputs],
        attrs={NODE: text, FILE: text},
    )
    def plugin(*arrays: np.ndarray, node: str, file: str) -> np.ndarray | tuple[np.ndarray, ...]:
        run = _RUN.get()
        results: list[np.ndarray] = [np.zeros(0, _TYPES[letter]) for letter in outputs]
        if run is not None and run.failure is None:
            try:
                results = run.interpret(node, file, arrays)
            except BaseException as failure:
                run.failure = failure
        return tuple(results) if len(results) > 1 else results[0]


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
