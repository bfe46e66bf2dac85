"""A rank's engine as a Polygraphy runner, whatever its backend."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from moecompiler.artifact import Artifact
from moecompiler.debugging.reduce import WithoutPeers
from moecompiler.errors import UserError
from moecompiler.graph import load_program
from moecompiler.runtime.communicator import using_communicator
from moecompiler.runtime.session import closing
from moecompiler.tools.backend import open_backend
from moecompiler.validation.engines import Engine, open_engine
from moecompiler.validation.place import Arrays


class EngineRunner(BaseRunner):
    """``path``: ``rankN.onnx`` or ``rankN.plan``, be it there or not, in an engine directory. One step at a time, on inputs by
    the graph's names, caches among them. A rank of several runs without its peers: of a sum it has its own share, and what is
    gathered is its own, repeated.

    Raises: PolygraphyException where it is no such file, or cannot run here.
    """

    def __init__(self, path: str):
        super().__init__(prefix="moecompiler")
        self._path = Path(path)

    def activate_impl(self) -> None:
        try:
            rank = rank_of(self._path)
            artifact = Artifact.open(self._path.parent, ("engine",))
            artifact.check([rank])
            self._engine: Engine = open_engine(artifact, open_backend(artifact.header["backend"]), rank, threads=0)
            graph = load_program(artifact.path(f"rank{rank}.onnx")).model.graph
        except UserError as error:
            G_LOGGER.critical(str(error))  # which raises
        self._shapes = {
            value.name: tuple(dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim)
            for value in graph.input
        }
        self._inner: BaseRunner | None = None

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, dtype in self._engine.types.items():
            # Polygraphy makes no bfloat16; engines take float32 in its place
            known = dtype if dtype.isbuiltin == 1 else np.dtype(np.float32)
            metadata.add(name, dtype=known, shape=self._shapes[name])
        return metadata

    def infer_impl(self, feed_dict: Arrays) -> OrderedDict[str, np.ndarray]:
        if self._inner is None:
            self._inner = self._engine.runner(feed_dict)
            self._inner.activate()
        begin = time.perf_counter()
        with using_communicator(WithoutPeers()):
            outputs = self._inner.infer(feed_dict, check_inputs=False)
        self.inference_time = time.perf_counter() - begin
        return OrderedDict(outputs)

    def deactivate_impl(self) -> None:
        if self._inner is not None:
            self._inner.deactivate()
        with closing(self._engine.stage):
            del self._engine, self._inner


def rank_of(path: Path) -> int:
    """Raises: UserError where it is no engine's file."""
    found = re.fullmatch(r"rank(\d+)", path.stem)
    if found is None:
        raise UserError(f"{path}: is no engine of moecompiler's (rankN.onnx or rankN.plan)")
    return int(found[1])
