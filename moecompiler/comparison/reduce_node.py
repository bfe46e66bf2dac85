"""A plugin by itself: its node alone, on the step of a run where it is furthest from what its body computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from moecompiler.comparison.exact import Exact
from moecompiler.comparison.nodes import OpNode, as_the_op_says, weights_of
from moecompiler.comparison.op_level import Programs, attributes_of, compare_output
from moecompiler.comparison.result import OpCase
from moecompiler.comparison.runners import infer
from moecompiler.materializing import Materializer
from moecompiler.validation.place import Arrays


@dataclass(frozen=True)
class Tried:
    """A node run on some inputs. ``feeds`` and outputs are by the op's names; ``got``: by program, the plugin's first;
    ``cases``: each output against the exact one, in units in the last place."""

    node: OpNode
    what: str
    feeds: Arrays
    exact: Arrays
    got: dict[str, Arrays]
    cases: tuple[OpCase, ...]

    @property
    def wrong(self) -> bool:
        """Whether an output of the first program is further from the truth than the second's."""
        return not all(case.no_further for case in self.cases)

    @property
    def worst(self) -> OpCase:
        """The output that is wrong, or else furthest off."""
        return max(self.cases, key=_severity)


def try_node(
    node: OpNode, inputs: Sequence[tuple[str, Arrays]], programs: Programs, tensors: Materializer
) -> tuple[Tried, ...]:
    """Runs a node in both programs on named inputs (by the op's names), and in float64. ``tensors``: of its weights."""
    evaluator, weights, attributes = Exact(as_the_op_says(node)), weights_of(node, tensors), attributes_of(node)
    exact = evaluator(weights, [feeds for _, feeds in inputs])
    weights.clear()
    fed = [{node.inputs[name]: array for name, array in feeds.items()} for _, feeds in inputs]
    got: dict[str, list[Arrays]] = {}
    for name, opener in programs.openers.items():
        with opener(node.program, fed) as runner:
            results = [infer(runner, arrays) for arrays in fed]
        got[name] = [{op: arrays[tensor] for op, tensor in node.outputs.items()} for arrays in results]
    return tuple(
        _tried(node, what, feeds, exact[index], {name: arrays[index] for name, arrays in got.items()}, attributes)
        for index, (what, feeds) in enumerate(inputs)
    )


def worst_of(tried: Sequence[Tried]) -> Tried:
    """The one whose worst output is furthest off; the first of equals."""
    return max(tried, key=lambda each: _severity(each.worst))


def _tried(
    node: OpNode, what: str, feeds: Arrays, exact: Arrays, got: dict[str, Arrays], attributes: dict[str, object]
) -> Tried:
    cases = [
        compare_output(
            node, what, output, exact[output], {name: got[name][output] for name in got}, feeds, attributes, {}
        )
        for output in node.outputs
    ]
    return Tried(node, what, feeds, exact, got, tuple(cases))


def _severity(case: OpCase) -> tuple[bool, float]:
    first, second = case.errors.values()
    return not case.no_further, first.max / max(second.max, 1.0) if isfinite(second.max) else 0.0
