"""The Python operators of engines of ONNX Runtime: collectives, and plugins whose kernels are interpreted.

onnxruntime-extensions knows neither float16 nor bfloat16 in Python operators: numbers come and go as float32. An exception would
end the process: what a plugin's operator raises is kept until ONNX Runtime returns.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
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
PLUGINS_DOMAIN = "moecompiler.interpreted"
"""Of plugins' operators. onnxruntime-extensions keeps a domain's operators in one array, to which sessions point: all of a domain
must be there before its first session is."""
NODE, FILE = "node", "file"
"""Attributes of a plugin's operator: ``InterpretedNode`` as text, and the file of its weights."""

Interpret = Callable[[str, str, Sequence[np.ndarray]], list[np.ndarray]]
"""See ``base.PluginLibrary.interpret``."""

_MOST_INPUTS, _MOST_OUTPUTS = 16, 4


def plugin_operator(inputs: int, outputs: int) -> str:
    """The name of the operator that takes and gives so many tensors, all of them float32, in which every code, position and id
    is exact.

    Raises: ValueError where there is none with so many.
    """
    if inputs > _MOST_INPUTS or outputs > _MOST_OUTPUTS:
        raise ValueError(f"a plugin has {inputs} inputs and {outputs} outputs")
    return f"Plugin_{inputs}_{outputs}"


def is_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node of an engine file is a plugin's operator."""
    return bool(node.domain == PLUGINS_DOMAIN)


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


def library(*, with_plugins: bool) -> str:
    """Registers collectives and, if wanted, plugins, once per process, as onnxruntime-extensions wants it; returns its library's
    path."""
    path = _collectives()
    if with_plugins:
        _plugins()
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
def _plugins() -> None:
    for inputs in range(1, _MOST_INPUTS + 1):
        for outputs in range(1, _MOST_OUTPUTS + 1):
            _plugin(inputs, outputs)


def _plugin(inputs: int, outputs: int) -> None:
    from onnxruntime_extensions import PyCustomOpDef, onnx_op

    @onnx_op(
        op_type=f"{PLUGINS_DOMAIN}::{plugin_operator(inputs, outputs)}",
        inputs=[PyCustomOpDef.dt_float] * inputs,
        outputs=[PyCustomOpDef.dt_float] * outputs,
        attrs={NODE: PyCustomOpDef.dt_string, FILE: PyCustomOpDef.dt_string},
    )
    def plugin(*arrays: np.ndarray, node: str, file: str) -> np.ndarray | tuple[np.ndarray, ...]:
        run = _RUN.get()
        results = [np.zeros(0, np.float32)] * outputs
        if run is not None and run.failure is None:
            try:
                results = run.interpret(node, file, arrays)
            except BaseException as failure:
                run.failure = failure
        return tuple(results) if outputs > 1 else results[0]


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
