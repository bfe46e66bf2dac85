"""Routing told from outside: the same as routing by oneself when it is told the same, and as PyTorch's when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from format_recipes import recipe_of

from moecompiler.backends.base import EngineLimits
from moecompiler.comparison.forced import extra_columns, force_routing, forced_name
from moecompiler.comparison.observed import router_taps, tensors_of, watched_places, with_outputs
from moecompiler.comparison.padded_reader import PaddedReader
from moecompiler.comparison.reference import ReferenceModel
from moecompiler.comparison.runners import BodiesOnOnnxRuntime
from moecompiler.comparison.runs import Run, observed_run
from moecompiler.comparison.sessions import ObservedSession, ProgramSession
from moecompiler.config import ExportOptions, NormalizationMode
from moecompiler.errors import UserError
from moecompiler.graph import Program, check
from moecompiler.materializing import Materializer
from moecompiler.validation.scenario import Scenario
from moecompiler.weights import TensorReader, materialize

if TYPE_CHECKING:
    from programs import Passage, Programs, Subject

RENORMALIZE, *OTHER_MODES = NormalizationMode.RENORMALIZE, NormalizationMode.NONE, NormalizationMode.SPARSE_MIXER


@pytest.fixture(scope="module")
def scenario(passage: Passage) -> Scenario:
    return Scenario("text", passage.tokens[:2, :9], (6, 4), 3)


def limits(shipped: Subject) -> EngineLimits:
    return EngineLimits(2, 39, 40, shipped.config.vocab_size)


def run(
    shipped: Subject, program: Program, reader: TensorReader, scenario: Scenario, forced: dict[int, np.ndarray] | None
) -> Run:
    from programs import GRID

    @contextmanager
    def opened(rank: int) -> Iterator[ObservedSession]:
        places, taps = watched_places(program), [] if forced else router_taps(program, ())
        routers = {t.layer: materialize(t.router, reader).astype(np.float32) for t in taps if t.router is not None}
        wide = with_outputs(force_routing(program) if forced else program, tensors_of(places, taps))
        with BodiesOnOnnxRuntime(reader, 1)(wide, ()) as runner:
            yield ProgramSession(runner, wide, limits(shipped), "float32", places, taps, routers)

    return observed_run(opened, GRID["one-rank"], scenario, forced)


def reference(
    shipped: Subject,
    scenario: Scenario,
    forced: dict[int, np.ndarray] | None,
    mode: NormalizationMode = RENORMALIZE,
    form: str = "none",
) -> Run:
    from programs import GRID, MAX_SEQ_LEN

    options, recipe = ExportOptions("float32", mode, MAX_SEQ_LEN), recipe_of(form, shipped)
    model = ReferenceModel(shipped.config, GRID["one-rank"], options, (recipe,), limits(shipped))
    return observed_run(model.sessions(shipped.reader), model.mapping, scenario, forced)


def other_logits(run: Run) -> dict[int, np.ndarray]:
    """The experts' logits, dealt to others."""
    return {layer: np.roll(array, 3, axis=-1) for layer, array in run.routed.items()}


@pytest.mark.parametrize("mode", [RENORMALIZE, *(pytest.param(mode, marks=pytest.mark.slow) for mode in OTHER_MODES)])
def test_a_fused_op_does_as_pytorch_does(
    shipped: Subject, fused: Callable[..., Program], scenario: Scenario, mode: NormalizationMode
) -> None:
    program = fused("float32", "none", mode)
    check(force_routing(program))
    reader = PaddedReader(shipped.reader, 128)
    free, own = reference(shipped, scenario, None, mode), run(shipped, program, shipped.reader, scenario, None)
    assert sorted(own.routed) == [0, 1, 2, 3]
    for layer, logits in free.routed.items():
        np.testing.assert_allclose(own.routed[layer], logits, atol=2e-4)
    np.testing.assert_allclose(own.logits, free.logits, atol=5e-4)
    np.testing.assert_allclose(own.hidden["model.layers.1.mlp"], free.hidden["model.layers.1.mlp"], atol=1e-4)
    told = run(shipped, program, reader, scenario, dict(free.routed))
    np.testing.assert_allclose(told.logits, free.logits, atol=5e-4)
    others = other_logits(free)
    expected = reference(shipped, scenario, others, mode)
    np.testing.assert_allclose(run(shipped, program, reader, scenario, others).logits, expected.logits, atol=5e-4)
    assert np.abs(expected.logits - free.logits).max() > 1


@pytest.mark.parametrize(
    "form", ["int4_asymmetric", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int8", "int4", "nvfp4", "fp8"))]
)
def test_codes_are_the_same_with_more_features(
    shipped: Subject, fused: Callable[..., Program], scenario: Scenario, form: str
) -> None:
    program = fused("float32", form)
    free = run(shipped, program, shipped.reader, scenario, None)
    told = run(shipped, program, PaddedReader(shipped.reader, 128), scenario, dict(free.routed))
    np.testing.assert_allclose(told.logits, free.logits, atol=2e-3)
    assert np.abs(free.logits).max() > 5


def test_weights_of_more_features_are_the_weights_and_zeros(shipped: Subject, fused: Callable[..., Program]) -> None:
    program = fused("float32", "int4_asymmetric")
    wide = force_routing(program)
    tensors, plain = Materializer(PaddedReader(shipped.reader, 128)), Materializer(shipped.reader)
    (node,) = (node for node in program.model.graph.node if node.name.startswith("model.layers.2.mlp/MoE"))
    (new,) = (each for each in wide.model.graph.node if each.name == node.name)
    for index in range(2, 8):
        old, grown = plain.tensor(program.weights[node.input[index]]), tensors.tensor(wide.weights[new.input[index]])
        rows = grown if index < 5 else grown.reshape(8, -1, *grown.shape[1:])[:, :128].reshape(old.shape)
        np.testing.assert_array_equal(rows[:, : old.shape[1]], old)
    assert forced_name(2) in {value.name for value in wide.model.graph.input}


@pytest.mark.parametrize(
    ("hidden", "experts", "block", "columns"),
    [(128, 8, 0, 128), (4096, 8, 128, 128), (32, 8, 16, 32), (96, 40, 64, 64)],
)
def test_columns(hidden: int, experts: int, block: int, columns: int) -> None:
    assert extra_columns(hidden, experts, block) == columns


def test_graphs_that_have_logits_as_a_tensor(shipped: Subject, programs: Programs, scenario: Scenario) -> None:
    """Those without fused ops."""
    from programs import GRID, MAX_SEQ_LEN

    options = ExportOptions("float32", max_seq_len=MAX_SEQ_LEN)
    program = programs.optimized(shipped.config, GRID["one-rank"], 0, options)
    free = run(shipped, program, shipped.reader, scenario, None)
    others = other_logits(free)
    told, expected = run(shipped, program, shipped.reader, scenario, others), reference(shipped, scenario, others)
    np.testing.assert_allclose(told.logits, expected.logits, atol=5e-4)
    assert np.abs(told.logits - free.logits).max() > 1


def test_what_cannot_be_told(shipped: Subject, fused: Callable[..., Program]) -> None:
    class Codes:
        def read(self, *arguments: object) -> None: ...
        def scheme(self, name: str) -> None: ...
        def read_codes(self, *arguments: object) -> None: ...

    with pytest.raises(UserError, match="codes or scales that are for its own features"):
        PaddedReader(Codes(), 128)  # type: ignore[arg-type]
    empty = Program(onnx.ModelProto())
    with pytest.raises(UserError, match="no routers"):
        force_routing(empty)
