"""What holds for all passes together: any of them, in any order that their needs allow, keeps the numbers; what is done is done;
the same input gives the same bytes; and where a node comes from stays known."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import GRID, Subject, random_passage, random_subject, run_ranks
from readers import ArrayReader

from moecompiler.backends.base import EngineLimits
from moecompiler.backends.onnxruntime import OnnxRuntimeSession
from moecompiler.backends.onnxruntime_program import WeightCache, open_program
from moecompiler.config import ExportOptions
from moecompiler.export import export_rank
from moecompiler.graph import Program, check, is_collective, module_of
from moecompiler.passes.pipelines import named_pipelines, passes_by_name
from moecompiler.pipeline import Pass, apply, run_passes

pytestmark = pytest.mark.xdist_group("guarantees")
SLOTS = 24
PASSES = passes_by_name()
ORDERS = st.lists(st.sampled_from(sorted(PASSES)), min_size=1, max_size=7)
# where a pass changes the order of operations a rounding is allowed; bfloat16 is computed in float32
BOUNDS = {("one-rank", "float16"): 3e-2, ("ep2-pp2", "float32"): 2e-5, ("tp2", "bfloat16"): 2e-5}
EP2 = ("ep2-pp2", "float32")


@functools.cache
def subject() -> Subject:
    return random_subject(num_hidden_layers=2, num_local_experts=4, sliding_window=9)


@functools.cache
def exported(mapping: str, dtype: str) -> tuple[Program, ...]:
    options = ExportOptions(dtype, max_seq_len=SLOTS)
    ranks = range(GRID[mapping].world_size)
    return tuple(export_rank(subject().config, GRID[mapping], rank, options) for rank in ranks)


@functools.cache
def tidied(mapping: str, dtype: str) -> tuple[Program, ...]:
    return tuple(run_passes(named_pipelines()["ootb"], program)[0] for program in exported(mapping, dtype))


@functools.cache
def weights() -> WeightCache:
    reader = subject().reader
    assert isinstance(reader, ArrayReader)
    return WeightCache(reader)


def logits(programs: Sequence[Program], mapping: str) -> np.ndarray:
    limits = EngineLimits(3, SLOTS - 1, SLOTS, subject().config.vocab_size)
    sessions = [OnnxRuntimeSession(open_program(each, weights(), 1), limits) for each in programs]
    passage = random_passage(subject().config.vocab_size, (7, 2, 5), decode_steps=4)
    return run_ranks(sessions, GRID[mapping], passage)


@functools.cache
def expected(mapping: str, dtype: str) -> np.ndarray:
    return logits(exported(mapping, dtype), mapping)


def named(names: Sequence[str]) -> tuple[Pass, ...]:
    return tuple(PASSES[name] for name in names)


def keeps_the_numbers(names: list[str], tidy: bool, case: tuple[str, str]) -> None:
    """On exports as they are, and tidied, where fusing passes match at once."""
    given_programs = tidied(*case) if tidy else exported(*case)
    made = [run_passes(named(names), program, allow_missed=True)[0] for program in given_programs]
    for program in made:
        check(program)
    np.testing.assert_allclose(logits(made, case[0]), expected(*case), atol=BOUNDS[case], rtol=0)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(names=ORDERS, tidy=st.booleans())
def test_any_passes_in_any_order_keep_the_numbers(names: list[str], tidy: bool) -> None:
    keeps_the_numbers(names, tidy, min(BOUNDS))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(names=ORDERS, tidy=st.booleans(), case=st.sampled_from(sorted(BOUNDS)))
def test_in_all_mappings_and_types(names: list[str], tidy: bool, case: tuple[str, str]) -> None:
    keeps_the_numbers(names, tidy, case)


PIPELINE = [name for name in PASSES if name != "restore"]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_runs_twice_changes_nothing_the_second_time(name: str) -> None:
    """On the export, and on what the passes before it in the table of all passes make of it."""
    before = PIPELINE[: PIPELINE.index(name)] if name in PIPELINE else PIPELINE
    program, _ = run_passes(named(before), exported(*EP2)[0], allow_missed=True)
    once, _ = apply(PASSES[name], program)
    check(once)
    twice, result = apply(PASSES[name], once)
    assert result.changes == ()
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)
    assert dict(twice.weights) == dict(once.weights)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(names=ORDERS)
def test_the_same_passes_write_the_same_bytes(names: list[str]) -> None:
    program = tidied(*EP2)[1]
    one, two = (run_passes(named(names), program, allow_missed=True)[0] for _ in range(2))
    assert one.model.SerializeToString(deterministic=True) == two.model.SerializeToString(deterministic=True)
    assert list(one.weights.items()) == list(two.weights.items())


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(names=ORDERS)
def test_every_node_says_where_it_comes_from(names: list[str]) -> None:
    """Names stay distinct, and of a module that HF's model has; collectives stay where they were."""
    program = tidied(*EP2)[0]
    modules = {module_of(node.name) for node in program.model.graph.node}
    parents = {".".join(module.split(".")[:end]) for module in modules for end in range(1, module.count(".") + 1)}
    made, _ = run_passes(named(names), program, allow_missed=True)
    nodes = made.model.graph.node
    assert len({node.name for node in nodes}) == len(nodes)
    assert {module_of(node.name) for node in nodes} <= modules | parents | {""}
    assert [n.name for n in nodes if is_collective(n)] == [n.name for n in program.model.graph.node if is_collective(n)]
