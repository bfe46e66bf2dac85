"""The reference: every rank's torch module in float32, all ranks in lockstep, with all that went in and out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moecompiler.export import cache_names
from moecompiler.graph import output_of
from moecompiler.model import Cache, RankModule
from moecompiler.reference import empty_caches
from moecompiler.rounded_cache import as_codes, as_numbers
from moecompiler.runtime.communicator import Communicator, using_communicator
from moecompiler.validation.place import Arrays, RankPlace
from moecompiler.validation.recording import RecordingCommunicator
from moecompiler.validation.scenario import Scenario, Step
from moecompiler.validation.ties import watched_routers, without_ties


@dataclass(frozen=True)
class RankStep:
    """One step of one rank, by the names its graph has: what went in, what came out, what crossed the boundaries of
    embedding, layers, attention and MoE inside (``graph.output_of``), the rank's own part of those that are sums, and each
    token's smallest router margin in the rank's layers ``[B, S]``."""

    feeds: Arrays
    outputs: Arrays
    inner: Arrays
    partials: Arrays
    margins: np.ndarray


def run_reference(
    module: RankModule,
    place: RankPlace,
    steps: Sequence[Step],
    communicator: Communicator,
    types: Mapping[str, np.dtype] | None = None,
) -> list[RankStep]:
    """Runs one rank's float32 module through ``steps``; its peers must do the same at the same time. Every step's inputs are
    rounded to ``types``, an engine's, where given: the engine can be compared on the very same."""
    mapping, rank, stage = place.mapping, place.rank, place.mapping.tp_size
    caches = empty_caches(place.config, mapping, rank, place.options, len(steps[0].input_ids))
    recorder = RecordingCommunicator(communicator)
    records = []
    for step in steps:
        x = step.input_ids if mapping.is_first_stage(rank) else communicator.receive(rank - stage)
        feeds = _feeds(place, step, x, caches)
        if types is not None:
            held = {name: as_codes(place.quantization, name, a, place.options.dtype) for name, a in feeds.items()}
            feeds = {name: rounded(array, types[name]) for name, array in held.items()}
        with _boundaries(module, recorder) as (inner, partials), using_communicator(recorder):
            outputs, caches, margins = call_module(module, place, feeds, codes=types is not None)
        records.append(RankStep(feeds, outputs, inner, partials, margins))
        if not mapping.is_last_stage(rank):
            communicator.send(outputs[place.main_output], rank + stage)
    return records


def choose_rows(module: RankModule, place: RankPlace, scenario: Scenario, communicator: Communicator) -> Scenario:
    """Of a scenario's rows and spare rows those that are farthest from a tie of any rank's routers; its peers must do the same
    at the same time, and get the same."""
    tokens = scenario.candidates()
    whole = Scenario(scenario.name, tokens, (tokens.shape[1],) * len(tokens), 0)
    with _routed_only(module, place):
        (record,) = run_reference(module, place, whole.steps(), communicator)
    return without_ties(scenario, np.min(communicator.gather_objects(record.margins), axis=0))


@contextmanager
def _routed_only(module: RankModule, place: RankPlace) -> Iterator[None]:
    """Meanwhile the model's last experts add nothing: no router comes after them, and they are most of the work of a layer."""
    if not place.mapping.is_last_stage(place.rank):
        yield
        return
    block = module.get_submodule(f"model.layers.{place.layers[-1]}.mlp")
    experts = block.get_submodule("experts")
    block.register_module("experts", _NoExperts())
    try:
        yield
    finally:
        block.register_module("experts", experts)


class _NoExperts(torch.nn.Module):
    def forward(self, x: torch.Tensor, _share: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def call_module(
    module: RankModule, place: RankPlace, feeds: Arrays, *, codes: bool = False
) -> tuple[Arrays, list[Cache], np.ndarray]:
    """The rank module called as its graph is: named arrays in, named float32 arrays out; the updated caches again; and each
    token's smallest router margin ``[B, S]``. With ``codes``, quantized caches are given as an engine holds them."""
    if codes:
        feeds = {name: as_numbers(place.quantization, name, a, place.options.dtype) for name, a in feeds.items()}
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    pairs = [cache_names(layer, "past_key_values") for layer in place.layers]
    caches = [(tensors[key].float(), tensors[value].float()) for key, value in pairs]
    x = tensors[place.main_input]
    x = x.float() if x.is_floating_point() else x
    with torch.inference_mode(), watched_routers(module) as margins:
        y, present = module(x, tensors["position_ids"], tensors.get("last_token_ids"), caches)
    outputs = {place.main_output: y.numpy()}
    for layer, cache in zip(place.layers, present, strict=True):
        for name, tensor in zip(cache_names(layer, "present"), cache, strict=True):
            outputs[name] = tensor.numpy()
    return outputs, present, np.min(margins, axis=0).reshape(x.shape[:2])


def _feeds(place: RankPlace, step: Step, x: np.ndarray, caches: Sequence[Cache]) -> Arrays:
    feeds: Arrays = {place.main_input: x, "position_ids": step.position_ids}
    if place.main_output == "logits" and not place.options.all_logits:
        feeds["last_token_ids"] = step.last_token_ids
    for layer, cache in zip(place.layers, caches, strict=True):
        for name, tensor in zip(cache_names(layer, "past_key_values"), cache, strict=True):
            feeds[name] = tensor.numpy()
    return feeds


@contextmanager
def _boundaries(module: RankModule, recorder: RecordingCommunicator) -> Iterator[tuple[Arrays, Arrays]]:
    """Collects, while the module runs, what leaves the embedding, each layer, its attention and its MoE, and this rank's part
    of what is summed over ranks."""
    inner: Arrays = {}
    partials: Arrays = {}

    def hook(name: str) -> Any:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            inner[output_of(name)] = tensor.numpy().copy()
            if recorder.last is not None:
                partials[output_of(name)], recorder.last = recorder.last.reshape(tensor.shape), None

        return note

    watched = [
        (name, part)
        for name, part in module.named_modules()
        if name.endswith((".self_attn", ".mlp", ".embed_tokens")) or name.rpartition(".")[0] == "model.layers"
    ]
    handles = [part.register_forward_hook(hook(name)) for name, part in watched]
    try:
        yield inner, partials
    finally:
        for handle in handles:
            handle.remove()


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An input as the engine takes it: rounded to its dtype; a dtype that numpy has not itself (bfloat16) is left in float32."""
    value = np.ascontiguousarray(array, dtype=dtype)
    return value if dtype.kind in "fi" else value.astype(np.float32)
