"""Stamping: one exported layer, repeated, is what torch exports when it is asked for all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from programs import GRID, MAX_SEQ_LEN, Programs, Subject, build_and_load

from moecompiler import export
from moecompiler.config import ExportOptions
from moecompiler.graph import Program, module_of, output_of
from moecompiler.mapping import Mapping

OPTIONS = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
# stages of several layers, with and without a head: name → (mapping, rank)
STAGES: dict[str, tuple[Mapping, int]] = {
    "the whole model": (GRID["one-rank"], 0),
    "two first layers": (GRID["pp2"], 0),
}
Both = tuple[Mapping, int, Program, Program]


class Whole(list[int]):
    """Layers of which the first are all of them: the exporter is asked for every one."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


class Unstamped(Mapping):
    def layers(self, rank: int, num_layers: int) -> Any:
        return Whole(super().layers(rank, num_layers))


@pytest.fixture(scope="module", params=STAGES)
def both(request: pytest.FixtureRequest, programs: Programs, shipped: Subject) -> Both:
    """A stage as it is stamped, and as torch exports it whole."""
    mapping, rank = STAGES[request.param]
    stamped = programs.exported(shipped.config, mapping, rank, OPTIONS)
    unstamped = Unstamped(**mapping.to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "stamp_layers", lambda model, layers: model)
        full = programs.exported(shipped.config, unstamped, rank, OPTIONS)
    return mapping, rank, stamped, full


def integer_scalars(graph: onnx.GraphProto) -> set[str]:
    """The inner values that are sizes, or made of sizes."""
    types = {value.name: value.type.tensor_type for value in graph.value_info}
    return {
        name
        for name, tensor in types.items()
        if tensor.elem_type == onnx.TensorProto.INT64 and tensor.HasField("shape") and not tensor.shape.dim
    }


def test_same_graph(both: Both) -> None:
    """As many nodes of every op from every module, the same weights, inputs and outputs. Constants and arithmetic on the sizes
    of the batch do not count: torch has them once for all layers."""
    *_, stamped, full = both

    def histogram(program: Program) -> Counter[tuple[str, str]]:
        graph = program.model.graph
        scalars = integer_scalars(graph)
        return Counter(
            (node.op_type, module_of(node.name))
            for node in graph.node
            if node.op_type != "Constant" and not scalars.issuperset(node.output)
        )

    assert histogram(stamped) == histogram(full)
    assert stamped.weights == full.weights
    for part in ("input", "output"):
        assert list(getattr(stamped.model.graph, part)) == list(getattr(full.model.graph, part))


def test_same_wiring(both: Both) -> None:
    """Walked from the outputs to the inputs side by side, the graphs have the same op on the same operands everywhere; but the
    sizes of the batch may be taken from any input."""
    *_, stamped, full = both
    one, other = (Walker(program.model.graph) for program in (stamped, full))
    pairs = [(value.name, value.name) for value in full.model.graph.output]
    seen = set()
    while pairs:
        pair = pairs.pop()
        if pair in seen or (pair[0] in one.scalars and pair[1] in other.scalars):
            continue
        seen.add(pair)
        a, b = one.describe(pair[0]), other.describe(pair[1])
        assert a[0] == b[0], pair
        pairs += zip(a[1], b[1], strict=True)
    assert len(seen) > 300


class Walker:
    """Who makes a tensor, of what."""

    def __init__(self, graph: onnx.GraphProto):
        self.producers = {name: (node, i) for node in graph.node for i, name in enumerate(node.output)}
        self.scalars = integer_scalars(graph)

    def describe(self, name: str) -> tuple[Any, list[str]]:
        """The op, its attributes and which of its outputs this is; and the operands. Weights and inputs by name."""
        if name not in self.producers:
            return name, []
        node, index = self.producers[name]
        attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
        return (node.op_type, node.domain, attributes, index), list(node.input)


def test_same_numbers(both: Both, shipped: Subject, tmp_path: Path) -> None:
    """In ONNX Runtime all outputs of both, caches too, have the same bits."""
    mapping, rank, *graphs = both
    rng = np.random.default_rng(3)
    config, batch, length = shipped.config, 2, 5
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, config.vocab_size, (batch, length)),
        "position_ids": np.tile(np.arange(7, 7 + length), (batch, 1)),
        "last_token_ids": np.array([4, 2]),
    }
    for layer in mapping.layers(rank, config.num_hidden_layers):
        for name in export.cache_names(layer, "past_key_values"):
            shape = (batch, config.num_key_value_heads, MAX_SEQ_LEN, config.head_dim)
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
    stamped, full = build_and_load(graphs, shipped, tmp_path)
    used = {name: array for name, array in feeds.items() if name in [i.name for i in stamped.session.get_inputs()]}
    results = [engine.session.run(None, used) for engine in (stamped, full)]
    assert len(results[0]) == 1 + 2 * len(mapping.layers(rank, config.num_hidden_layers))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["one-rank", "pp2", "pp4"])
def test_boundaries_have_names(name: str, programs: Programs, shipped: Subject) -> None:
    """What leaves the embedding, each layer's attention and MoE, and each layer, can be asked for by name; what leaves a stage
    without a head is its output."""
    mapping = GRID[name]
    for rank in range(mapping.world_size):
        graph = programs.exported(shipped.config, mapping, rank, OPTIONS).model.graph
        produced = {name: module_of(node.name) for node in graph.node for name in node.output}
        layers = mapping.layers(rank, shipped.config.num_hidden_layers)
        for layer in layers:
            module = f"model.layers.{layer}"
            assert produced[output_of(f"{module}.self_attn")].startswith(f"{module}.self_attn")
            assert produced[output_of(f"{module}.mlp")].startswith(f"{module}.mlp")
            ends_stage = layer == layers[-1] and not mapping.is_last_stage(rank)
            assert produced["next_hidden_states" if ends_stage else output_of(module)] == module
        if mapping.is_first_stage(rank):
            assert produced[output_of("model.embed_tokens")].startswith("model.embed_tokens")


def test_residual_stream(programs: Programs, shipped: Subject) -> None:
    """Each layer adds its attention's output to what the layer before left, and its MoE's output to that."""
    graph = programs.exported(shipped.config, GRID["one-rank"], 0, OPTIONS).model.graph
    entry = output_of("model.embed_tokens")
    for layer in range(shipped.config.num_hidden_layers):
        module = f"model.layers.{layer}"
        first, second = (n for n in graph.node if n.op_type == "Add" and module_of(n.name) == module)
        assert list(first.input) == [entry, output_of(f"{module}.self_attn")]
        assert list(second.input) == [first.output[0], output_of(f"{module}.mlp")]
        entry = output_of(module)
        assert list(second.output) == [entry]


def test_every_inner_value_has_a_type(programs: Programs, shipped: Subject) -> None:
    """Passes go by shapes: stamped layers have them as the first one has."""
    graph = programs.exported(shipped.config, GRID["one-rank"], 0, OPTIONS).model.graph
    known = {value.name for value in (*graph.value_info, *graph.input, *graph.output)}
    produced = [name for node in graph.node for name in node.output]
    assert [name for name in produced if name not in known] == []
    assert len(set(produced)) == len(produced)
