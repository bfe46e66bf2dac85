"""One rank of a program as a session that is looked into: PyTorch's module, or a program by a Polygraphy runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from polygraphy.backend.base import BaseRunner
from torch import nn

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime_program import input_types
from moecompiler.comparison.forced import forced_name
from moecompiler.comparison.observed import RouterTap, read_routing
from moecompiler.comparison.runners import infer
from moecompiler.graph import Program, output_of
from moecompiler.model import Cache, RankModule
from moecompiler.reference import empty_caches
from moecompiler.routing import route
from moecompiler.runtime.session import StageSession
from moecompiler.validation.place import RankPlace


class ObservedSession(StageSession, Protocol):
    """A session that keeps what was seen in its last step: ``hidden``: outputs of modules ``[B, S, hidden]`` float32,
    ``routed``: router logits by layer ``[B, S, experts]`` float32."""

    hidden: dict[str, np.ndarray]
    routed: dict[int, np.ndarray]

    def force(self, logits: Mapping[int, np.ndarray] | None) -> None:
        """Router logits ``[B, S, experts]`` by layer that the next step is to take in place of its own; None: its own."""


class ModuleSession:
    """A rank's float32 module; its peers must run at the same time."""

    def __init__(self, module: RankModule, place: RankPlace, limits: EngineLimits):
        self.max_batch_size, self.max_input_len = limits.max_batch_size, limits.max_input_len
        self.max_seq_len, self.vocab_size = limits.max_seq_len, limits.vocab_size
        self._module, self._place = module, place
        self._caches: list[Cache] = []
        self._forced: Mapping[int, np.ndarray] | None = None
        self.hidden: dict[str, np.ndarray] = {}
        self.routed: dict[int, np.ndarray] = {}

    def start(self, batch: int) -> None:
        place = self._place
        self._caches = empty_caches(place.config, place.mapping, place.rank, place.options, batch)

    def force(self, logits: Mapping[int, np.ndarray] | None) -> None:
        self._forced = logits

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """See ``StageSession.step``."""
        rows = slice(first, first + len(position_ids))
        caches = [(key[rows], value[rows]) for key, value in self._caches]
        given = [torch.from_numpy(np.require(each, requirements="W")) for each in (x, position_ids, last_token_ids)]
        with torch.inference_mode(), self._watched(position_ids.shape):
            y, present = self._module(*given, caches)
        for own, new in zip(self._caches, present, strict=True):
            own[0][rows], own[1][rows] = new
        return np.asarray(y.numpy())

    @contextmanager
    def _watched(self, shape: tuple[int, ...]) -> Iterator[None]:
        self.hidden, self.routed = {}, {}
        handles = []
        for name, part in self._module.named_modules():
            if name.endswith(".mlp.gate"):
                handles.append(part.register_forward_hook(self._route(int(name.split(".")[2]), shape)))
            elif _is_watched(name):
                handles.append(part.register_forward_hook(self._note(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.hidden[name] = tensor.numpy().copy()

        return hook

    def _route(self, layer: int, shape: tuple[int, ...]) -> Any:
        def hook(router: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            logits = F.linear(inputs[0], router.weight)
            self.routed[layer] = logits.numpy().reshape(*shape, -1).copy()
            if self._forced is None:
                return output
            forced = torch.from_numpy(np.ascontiguousarray(self._forced[layer])).reshape(logits.shape)
            weights, experts = route(forced, router.top_k, router.mode)
            return torch.zeros_like(output).scatter(1, experts, weights)

        return hook


def _is_watched(name: str) -> bool:
    return name.endswith((".self_attn", ".mlp", ".embed_tokens")) or name.rpartition(".")[0] == "model.layers"


class ProgramSession:
    """A rank's program with outputs to look at (``observed.with_outputs``), by an active Polygraphy runner; caches go out of
    one step and into the next. ``routers``: by layer, ``[experts, hidden]`` float32."""

    def __init__(
        self,
        runner: BaseRunner,
        program: Program,
        limits: EngineLimits,
        dtype: str,
        places: Sequence[str],
        taps: Sequence[RouterTap],
        routers: Mapping[int, np.ndarray],
    ):
        self.max_batch_size, self.max_input_len = limits.max_batch_size, limits.max_input_len
        self.max_seq_len, self.vocab_size = limits.max_seq_len, limits.vocab_size
        self._runner, self._types, self._dtype = runner, input_types(program), dtype
        self._places, self._taps, self._routers = places, taps, routers
        self._output = program.model.graph.output[0].name
        self._caches: dict[str, np.ndarray] = {}
        self._forced: Mapping[int, np.ndarray] | None = None
        self.hidden: dict[str, np.ndarray] = {}
        self.routed: dict[int, np.ndarray] = {}

    def start(self, batch: int) -> None:
        self._caches = {
            name: np.zeros((batch, *(int(dim) for dim in shape[1:])), dtype)
            for name, (dtype, shape) in self._types.items()
            if name.startswith("past_key_values.")
        }

    def force(self, logits: Mapping[int, np.ndarray] | None) -> None:
        self._forced = logits

    def step(self, x: np.ndarray, position_ids: np.ndarray, last_token_ids: np.ndarray, first: int = 0) -> np.ndarray:
        """See ``StageSession.step``."""
        rows = slice(first, first + len(position_ids))
        feeds = {"input_ids": x, "hidden_states": x, "position_ids": position_ids, "last_token_ids": last_token_ids}
        feeds = {name: array for name, array in feeds.items() if name in self._types}
        feeds |= {name: cache[rows] for name, cache in self._caches.items()}
        for layer, logits in (self._forced or {}).items():
            if (name := forced_name(layer)) in self._types:
                width = int(self._types[name][1][-1])
                feeds[name] = np.zeros((*logits.shape[:-1], width), np.float32)
                feeds[name][..., : logits.shape[-1]] = logits
        outputs = infer(self._runner, feeds)
        for name, cache in self._caches.items():
            cache[rows] = outputs[name.replace("past_key_values.", "present.")]
        self.hidden = {place: np.asarray(outputs[output_of(place)], np.float32) for place in self._places}
        found = read_routing(self._taps, outputs, self._routers, self._dtype)
        self.routed = {layer: array.reshape(*position_ids.shape, -1) for layer, array in found.items()}
        result = outputs[self._output]
        if self._output != "logits":
            return result
        if result.ndim == 3:
            result = result[np.arange(len(result)), last_token_ids]
        return result.astype(np.float32)
