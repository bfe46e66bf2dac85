"""A rewrite by itself: the smallest graph around it before and after, its weights and inputs, and what both compute."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moecompiler.backends.onnxruntime_program import WeightCache, run_part
from moecompiler.cutting import cut
from moecompiler.debugging.bisect import Culprit, make
from moecompiler.debugging.region import Region, changed_region
from moecompiler.debugging.seeded import SeededReader
from moecompiler.debugging.subject import Subject
from moecompiler.debugging.unquantized import quantized_as
from moecompiler.errors import UserError
from moecompiler.graph import DOMAIN, Program, is_collective
from moecompiler.pipeline import Change, Pass, apply, run_passes
from moecompiler.runtime.communicator import Alone, using_communicator
from moecompiler.validation.difference import relative_error
from moecompiler.validation.place import Arrays

_MOST_RINGS, _MOST_NODES = 10, 200  # one layer of an export has 130 nodes
LARGEST_WEIGHTS = 12 * 10**6  # bytes; larger ones are replaced by random ones of a seed


@dataclass(frozen=True)
class Reduced:
    """``before`` and ``after`` compute the same tensors from ``inputs``, or should: ``expected`` and ``actual`` are what they do.
    ``seeded``: with random weights (``seeded.SeededReader``) in place of the checkpoint's."""

    before: Program
    after: Program
    inputs: Arrays
    expected: Arrays
    actual: Arrays
    seeded: bool


class WithoutPeers(Alone):
    """A rank that runs a part of its graph by itself: sums are its own share, and what is gathered is its own, repeated."""

    def all_gather(self, array: np.ndarray, group: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([array] * len(group), axis=-1)


def reduce_rewrite(subject: Subject, steps: Sequence[Pass], culprit: Culprit) -> Reduced:
    """The smallest graphs without and with the culprit's rewrite, and the inputs they have in the subject's first run. Where that
    quantizes weights, the graph without it has the numbers that codes stand for.

    Raises: UserError where nothing that both graphs compute depends on the difference.
    """
    before, after = (make(subject, steps, prefix).programs[culprit.rank] for prefix in (culprit.good, culprit.bad))
    region = changed_region(before, after)
    if not region.outputs:
        raise UserError(f"reduce: after pass {culprit.name} there is no tensor that the graph before it computes too")
    without, whole = _smallest(before, after, region, steps[culprit.index - 1], culprit.change)
    (without,) = quantized_as((without,), (whole,))
    parts = without, whole
    names = sorted(_inputs(parts[0]) | _inputs(parts[1]))
    inputs = subject.observe(_peers(subject, steps, culprit), names, culprit.rank)
    size = sum(recipe.nbytes for recipe in {*parts[0].weights.values(), *parts[1].weights.values()})
    seeded = size > LARGEST_WEIGHTS
    return with_weights(parts, inputs, WeightCache(SeededReader()) if seeded else subject.weights, seeded=seeded)


def with_weights(
    parts: tuple[Program, Program], inputs: Arrays, weights: WeightCache, *, seeded: bool = False
) -> Reduced:
    """Runs both parts on ``inputs``."""
    expected, actual = (run_alone(part, inputs, weights) for part in parts)
    return Reduced(*parts, inputs, expected, actual, seeded)


def run_alone(part: Program, inputs: Arrays, weights: WeightCache) -> Arrays:
    """All outputs of a part, unoptimized, on one rank without its peers."""
    graph = part.model.graph
    feeds = {value.name: inputs[value.name] for value in graph.input}
    weights.make_room({*part.weights.values()})
    with using_communicator(WithoutPeers()):
        return dict(zip((v.name for v in graph.output), run_part(part.model, part, weights, feeds), strict=True))


def errors(values: Arrays, expected: Arrays) -> dict[str, float]:
    """``‖value - expected‖ / ‖expected‖`` by name; infinite where the shape is another or a value is no number."""
    return {
        name: relative_error(values[name], wanted) if values[name].shape == wanted.shape else float("inf")
        for name, wanted in expected.items()
    }


def _smallest(
    before: Program, after: Program, region: Region, step: Pass, change: Change | None
) -> tuple[Program, Program]:
    """The region cut out of both, with as few nodes before it as the pass needs to make its rewrite again; the region alone
    where it does not, however many: a pass that sees further than a few nodes."""
    stops = {*region.inputs}
    alone = _part(before, region.outputs, stops), _part(after, region.outputs, stops)
    # what the rewrite reads and the graph before it does not: the pass has to see where that comes from
    read = _inputs(alone[1]) - _inputs(alone[0])
    outputs = tuple(dict.fromkeys((*region.outputs, *sorted(read), *_made_at(change, before, after))))
    part = _part(before, outputs, stops)
    for _ in range(_MOST_RINGS):
        if len(part.model.graph.node) > _MOST_NODES:
            break
        if apply(step, part)[1].changes:
            return part, _part(after, outputs, stops)
        stops = _a_node_earlier(before, stops)
        part = _part(before, outputs, stops)
    return alone


def _made_at(change: Change | None, before: Program, after: Program) -> list[str]:
    """The tensors of the node at which the rewrite was found, where it stands in both graphs: a pass may look from a reader
    back to what it rewrites."""
    if change is None:
        return []
    made = [
        [name for node in program.model.graph.node if node.name == change.node for name in node.output if name]
        for program in (before, after)
    ]
    return [name for name in made[0] if name in made[1]]


def _inputs(part: Program) -> set[str]:
    return {value.name for value in part.model.graph.input}


def _a_node_earlier(program: Program, stops: set[str]) -> set[str]:
    """What the nodes that make ``stops`` read. Collectives stay where they are: peers would be missing."""
    graph = program.model.graph
    held = {tensor.name for tensor in graph.initializer} | {""}
    makers = {name: node for node in graph.node for name in node.output}
    earlier: set[str] = set()
    for name in stops:
        node = makers.get(name)
        earlier |= {name} if node is None or is_collective(node) else {*node.input} - held
    return earlier


def _part(program: Program, outputs: Sequence[str], stops: Collection[str]) -> Program:
    """What computes ``outputs`` from ``stops``, with the functions and the weights that it uses."""
    model = cut(program.model, outputs, stops)
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    functions = [function for function in model.functions if function.name in used]
    del model.functions[:]
    model.functions.extend(functions)
    kept = {tensor.name for tensor in model.graph.initializer}
    return Program(model, {name: recipe for name, recipe in program.weights.items() if name in kept})


def _peers(subject: Subject, steps: Sequence[Pass], culprit: Culprit) -> list[Program]:
    """Every rank's program just before the rewrite of its number: the ranks of a stage then have the same tensors."""
    if culprit.change is None:
        return list(make(subject, steps, culprit.good).programs)
    limit = culprit.change.number - 1
    upto = steps[: culprit.index]
    return [run_passes(upto, program, allow_missed=True, limit=limit)[0] for program in subject.load()]
