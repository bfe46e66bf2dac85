"""Plugins that make a check fail, each in a folder that reproduces it: what ``compare --bisect`` writes, and its
``repro.py``."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from collections.abc import Mapping as TypingMapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moecompiler.comparison.capture import capture
from moecompiler.comparison.cases import cases_of
from moecompiler.comparison.exact import Exact
from moecompiler.comparison.nodes import OpNode, as_the_op_says, family_of, weights_of
from moecompiler.comparison.op_level import Programs, attributes_of
from moecompiler.comparison.reduce_node import Tried, try_node, worst_of
from moecompiler.comparison.reduced_node_folder import FACTS, figures, read_node_folder, write_node_folder
from moecompiler.comparison.step_inputs import StepInputs, inputs_of_steps
from moecompiler.debugging.reduce import LARGEST_WEIGHTS
from moecompiler.debugging.seeded import SeededReader
from moecompiler.errors import UserError
from moecompiler.graph import Program, exchanges
from moecompiler.mapping import Mapping
from moecompiler.materializing import Materializer
from moecompiler.tools.comparison.node_programs import node_programs
from moecompiler.tools.printing import USER_ERROR, complaint
from moecompiler.validation.place import Arrays
from moecompiler.validation.scenario import Step
from moecompiler.weights import TensorReader

LARGEST_MODEL = 4 << 30  # bytes of all ranks' weights


def write_reduced(
    names: Sequence[str],
    programs: Sequence[Program],
    mapping: Mapping,
    reader: TensorReader,
    steps: Sequence[Step],
    backend: str,
    folder: Path,
    tactics: TypingMapping[str, str],
    threads: int = 0,
) -> list[Tried]:
    """A folder below ``folder`` for each node of ``names``, whole or not at all: the node on the inputs of that of ``steps``,
    or if none shows it, on those harder ones, where the plugin is furthest off. ``make``: the node's programs (default: the
    backend's).

    Raises: UserError where a folder is somebody else's or cannot be written, or a node cannot be run alone.
    """

    found = []
    for name in names:
        _check_alone(programs, name)
        taken, tactic = _taken(programs, mapping, reader, steps, name), tactics.get(name, "")
        make = partial(node_programs, backend, tactic=tactic, threads=threads)
        tried, source = reduce_node(taken, steps, make, reader)
        facts = {"backend": backend, "rank": taken.rank, "tactic": tactic}
        _write(tried, source, facts, folder / re.sub(r"[^\w.-]+", "-", name))
        found.append(tried)
    return found


def _check_alone(programs: Sequence[Program], name: str) -> None:
    """Raises: UserError where a node exchanges with other ranks."""
    ops = {node.op_type for program in programs for node in program.model.graph.node if node.name == name}
    if any(map(exchanges, ops)):
        raise UserError(f"{name}: {', '.join(ops)} exchanges with other ranks, and cannot be run alone")


def _taken(
    programs: Sequence[Program], mapping: Mapping, reader: TensorReader, steps: Sequence[Step], name: str
) -> StepInputs:
    """A node's inputs in every step; where that would need too much memory, in the first, for which one node's weights are in
    memory at a time."""
    if sum(recipe.nbytes for program in programs for recipe in program.weights.values()) <= LARGEST_MODEL:
        return inputs_of_steps(programs, mapping, reader, steps, name)
    (found,) = capture(programs, mapping, reader, steps[0], [name])
    return StepInputs(found.rank, found.node, (found.feeds,))


def reduce_node(
    taken: StepInputs, steps: Sequence[Step], make: Callable[[TensorReader], Programs], reader: TensorReader
) -> tuple[Tried, TensorReader | None]:
    """The inputs on which a node is furthest off, and what reads its weights: None where they are too large to be handed on,
    and are random ones of a seed instead."""
    node, tensors = taken.node, Materializer(reader)
    inputs = [(_describe(index, steps[index]), feeds) for index, feeds in enumerate(taken.feeds)]
    worst = worst_of(try_node(node, inputs, make(reader), tensors))
    if not worst.wrong:
        lengths = steps[0].last_token_ids + 1
        harder = [(f"case {case}", feeds) for case, feeds in _cases(node, taken.feeds[0], lengths, tensors).items()]
        worst = worst_of((worst, *try_node(node, harder, make(reader), tensors)))
    if sum(recipe.nbytes for recipe in node.program.weights.values()) <= LARGEST_WEIGHTS:
        return worst, reader
    seeded = SeededReader()
    (again,) = try_node(node, [(worst.what, worst.feeds)], make(seeded), Materializer(seeded))
    return again, None


def _describe(index: int, step: Step) -> str:
    batch, length = step.position_ids.shape
    kind = "prefill" if index == 0 else f"decode step {index}"
    return f"{kind}, {batch} × {length} tokens"


def _cases(node: OpNode, real: Arrays, lengths: np.ndarray, tensors: Materializer) -> dict[str, Arrays]:
    """But for the real inputs themselves."""
    weights = weights_of(node, tensors)
    present = None
    if "present_key" in node.outputs:
        (whole,) = Exact(as_the_op_says(node))(weights, [real])
        present = {name: array for name, array in whole.items() if name.startswith("present_")}
    cases = cases_of(
        family_of(node.op),
        real,
        node.dtype,
        lengths=lengths,
        top_k=attributes_of(node).get("top_k", 0),
        local_experts=weights["expert_ids"].tolist() if "expert_ids" in weights else (),
        present=present,
    )
    return {name: feeds for name, feeds in cases.items() if name != "real"}


def _write(tried: Tried, reader: TensorReader | None, facts: dict[str, Any], folder: Path) -> None:
    if folder.exists() and not (folder / FACTS).is_file():
        raise UserError(f"{folder}: is there already, and no folder of a reduced plugin")
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        temporary.mkdir(parents=True)
        write_node_folder(tried, reader, facts, temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(folder: Path, arguments: Sequence[str]) -> int:
    """What a folder's ``repro.py`` does: 1 where the plugin is further from the truth than the body, 0 where it is not, 2 where
    that cannot be told."""
    parser = argparse.ArgumentParser(
        prog="repro.py", description="A plugin beside its op's body, both against float64."
    )
    parser.add_argument(
        "--backend", help="onnxruntime (kernels are interpreted) or tensorrt (default: as it was found)"
    )
    options = parser.parse_args(arguments)
    try:
        node, inputs, reader, facts = read_node_folder(folder)
        backend = options.backend or facts["backend"]
        programs = node_programs(backend, reader, facts["tactic"] if backend == facts["backend"] else "")
        (tried,) = try_node(node, [(facts["inputs"], inputs)], programs, Materializer(reader))
    except UserError as error:
        print(complaint(str(error)), file=sys.stderr)
        return USER_ERROR
    print(f"{node.name} ({node.op}) on {tried.what}")
    print("\n".join(figures(tried)))
    return int(tried.wrong)
