"""ONNX Runtime's engines: built from programs, they compute what the rank's torch module computes, step by step."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper
from programs import GRID, MAX_SEQ_LEN, Passage, Programs, Subject, largest_error, run_ranks, torch_sessions
from safetensors.numpy import load_file

from moecompiler.backends.base import BuildSettings, EngineLimits
from moecompiler.backends.choose import backend_names, find_backend
from moecompiler.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeSession
from moecompiler.backends.onnxruntime_lowering import lower
from moecompiler.config import ExportOptions
from moecompiler.errors import UserError
from moecompiler.graph import module_of
from moecompiler.weights import materialize

SETTINGS = BuildSettings(EngineLimits(3, MAX_SEQ_LEN, MAX_SEQ_LEN, 1536))
ALONE = GRID["one-rank"]
# The largest error of a logit (they span 36) against torch modules of the same weights; measured: 1e-5, 1e-5 and 0.02,
# which would be 0.1 if a token were routed differently.
BOUNDS = {"float32": 2e-4, "bfloat16": 2e-4, "float16": 0.2}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS)


def options(dtype: str) -> ExportOptions:
    return ExportOptions(dtype, max_seq_len=MAX_SEQ_LEN)


@DTYPES
def test_equals_torch(dtype: str, programs: Programs, shipped: Subject, passage: Passage, tmp_path: Path) -> None:
    """bfloat16 engines compute in float32, so the module holds weights rounded to bfloat16 and computes in float32 too."""
    engines = programs.engines(shipped, ALONE, options(dtype), tmp_path)
    wanted = torch_sessions(shipped, ALONE, options(dtype), OnnxRuntimeBackend().compute_dtype(dtype))
    logits = run_ranks(engines, ALONE, passage)
    assert logits.dtype == np.float32
    assert largest_error(logits, run_ranks(wanted, ALONE, passage)) < BOUNDS[dtype]


@pytest.fixture(scope="module")
def engine(programs: Programs, shipped: Subject, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeSession:
    directory = tmp_path_factory.mktemp("engine")
    (session,) = programs.engines(shipped, ALONE, options("float32"), directory)
    assert isinstance(session, OnnxRuntimeSession)
    return session


def test_start_empties_the_cache(engine: OnnxRuntimeSession, passage: Passage) -> None:
    """A second run has the same bits, and so has one after a smaller batch; without a start it has others."""
    first = run_ranks([engine], ALONE, passage)
    np.testing.assert_array_equal(run_ranks([engine], ALONE, passage), first)
    small = Passage(passage.tokens[1:2], passage.prompt_lengths[1:2], 2)
    assert largest_error(run_ranks([engine], ALONE, small), first[1:2, :3]) < 2e-4
    np.testing.assert_array_equal(run_ranks([engine], ALONE, passage), first)

    decode = passage.steps()[1]
    engine.start(3)
    assert largest_error(engine.step(*decode), first[:, 1]) > 1


def test_the_cache_persists(engine: OnnxRuntimeSession, passage: Passage) -> None:
    """Fed token by token, or in two parts, a prompt gives what it gives in one."""
    tokens = passage.tokens[:1, :12]
    zero = np.zeros(1, np.int64)

    def fed(*lengths: int) -> np.ndarray:
        engine.start(1)
        at = 0
        for length in lengths:
            positions = np.arange(at, at + length)[None]
            logits = engine.step(tokens[:, at : at + length], positions, zero + length - 1)
            at += length
        assert at == 12
        return logits

    whole = fed(12)
    assert largest_error(fed(*[1] * 12), whole) < 2e-4
    assert largest_error(fed(5, 7), whole) < 2e-4


def test_limits(engine: OnnxRuntimeSession, shipped: Subject) -> None:
    """The session says what ``EngineLimits`` it was loaded with."""
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (3, MAX_SEQ_LEN, MAX_SEQ_LEN)
    assert engine.vocab_size == shipped.config.vocab_size


@DTYPES
def test_files(dtype: str, programs: Programs, shipped: Subject, tmp_path: Path) -> None:
    """Under temporary names come a graph and a weights file, which the ``safetensors`` package reads, with just the rank's
    share of the checkpoint in the engine's dtype; progress runs from 0 to 1."""
    program = programs.optimized(shipped.config, GRID["ep2-pp2"], 3, options(dtype))
    told: list[float] = []
    staged = OnnxRuntimeBackend().build(program, shipped.reader, "rank3", tmp_path, SETTINGS, told.append)
    assert set(staged) == {"rank3.onnx", "rank3.safetensors"}
    assert sorted(tmp_path.iterdir()) == sorted(staged.values())
    assert all(path.name.startswith(".tmp-") for path in staged.values())
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] == pytest.approx(1, abs=0.01)

    arrays = load_file(staged["rank3.safetensors"].rename(tmp_path / "rank3.safetensors"))
    assert set(arrays) == {name for name, recipe in program.weights.items() if recipe.values is None}
    for name, array in arrays.items():
        wanted = materialize(program.weights[name], shipped.reader)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array.view(np.uint8), wanted.view(np.uint8))


def test_the_same_program_gives_the_same_files(programs: Programs, shipped: Subject, tmp_path: Path) -> None:
    contents = []
    for directory in (tmp_path / "one", tmp_path / "two"):
        directory.mkdir()
        program = programs.optimized(shipped.config, ALONE, 0, options("bfloat16"))
        staged = OnnxRuntimeBackend().build(
            program, shipped.reader, "rank0", directory, SETTINGS, lambda fraction: None
        )
        contents.append({name: path.read_bytes() for name, path in staged.items()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize(("dtype", "computed"), [("bfloat16", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16)])
def test_lowering(dtype: str, computed: int, programs: Programs, shipped: Subject) -> None:
    """No bfloat16 is left but in the weights; float16 stays; collectives are Python ops with the group as text; which experts
    are local stands in the graph; the argument is left alone."""
    program = programs.optimized(shipped.config, GRID["ep2-pp2"], 3, options(dtype))
    before = program.model.SerializeToString(deterministic=True)
    lowered = lower(program)
    assert program.model.SerializeToString(deterministic=True) == before
    graph = lowered.model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    assert set(types.values()) <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, computed}
    assert {types[value.name] for value in graph.output} == {computed}
    modules = {module_of(node.name) for node in program.model.graph.node}
    assert {module_of(node.name) for node in graph.node} <= modules | set(program.weights)

    collectives = [node for node in graph.node if node.op_type in ("AllReduce", "AllGather")]
    assert len(collectives) == 2 * 2 + 1
    for node in collectives:
        assert node.domain == "ai.onnx.contrib"
        assert [(attribute.name, attribute.s) for attribute in node.attribute] == [("group", b"2,3")]
    held = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL}
    for layer in (2, 3):
        ids = numpy_helper.to_array(held[f"model.layers.{layer}.mlp.experts.expert_ids"])
        assert ids.tolist() == [4, 5, 6, 7]


def test_compute_dtype_is_said() -> None:
    """Only bfloat16 is widened, and there is a note about it."""
    backend = OnnxRuntimeBackend()
    assert [backend.compute_dtype(dtype) for dtype in BOUNDS] == ["float32", "float32", "float16"]
    assert [len(backend.notes(dtype, SETTINGS)) for dtype in BOUNDS] == [0, 1, 0]
    assert "float32" in backend.notes("bfloat16", SETTINGS)[0]
    assert re.fullmatch(r"onnxruntime \d+\.\d+.*", backend.version())


def test_backends_by_name() -> None:
    for name in backend_names():
        assert find_backend(name).name == name
    with pytest.raises(UserError, match=r"--backend tensorflow: there is none of that name; choose from onnxruntime"):
        find_backend("tensorflow")


def test_an_engine_of_hidden_states(programs: Programs, shipped: Subject, tmp_path: Path) -> None:
    """The second stage takes hidden states; loaded with limits of its own it reports these."""
    mapping = GRID["pp2"]
    program = programs.optimized(shipped.config, mapping, 1, options("float16"))
    backend = OnnxRuntimeBackend()
    for name, path in backend.build(
        program, shipped.reader, "rank1", tmp_path, SETTINGS, lambda fraction: None
    ).items():
        path.rename(tmp_path / name)
    session = backend.load(tmp_path, "rank1", EngineLimits(2, 7, 9, 1536), threads=1)
    assert (session.max_batch_size, session.max_input_len, session.max_seq_len) == (2, 7, 9)
    session.start(2)
    hidden = np.random.default_rng(0).standard_normal((2, 4, shipped.config.hidden_size))
    logits = session.step(hidden.astype(np.float32), np.tile(np.arange(4), (2, 1)), np.array([3, 1]))
    assert logits.shape == (2, shipped.config.vocab_size)
    assert logits.dtype == np.float32
