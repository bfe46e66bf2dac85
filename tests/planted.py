"""Wrong rewrites, planted: what looks for them has to name exactly these."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_graphsurgeon as gs

from moecompiler.debugging.subject import ExportedRanks
from moecompiler.ops import OpSpec
from moecompiler.passes.fuse_add_rms_norm import FuseAddRMSNorm
from moecompiler.passes.fuse_attention import FuseAttention
from moecompiler.passes.fuse_moe import FuseMoE
from moecompiler.passes.fuse_rms_norm import FuseRMSNorm
from moecompiler.passes.pattern_pass import PatternPass
from moecompiler.pipeline import Pass, Rewrite
from moecompiler.weights import Recipe

# mapping's name, dtype, whether tidied → its ranks; see the fixture ``subject_of``
MakeSubject = Callable[..., ExportedRanks]

# the passes that tests bisect, on programs that are tidied already
STEPS: tuple[Pass, ...] = (FuseRMSNorm(), FuseAttention(), FuseMoE(), FuseAddRMSNorm())


class Wrong:
    """A pass whose rewrite number ``at`` (from 1, of those it makes on a graph) is followed by a mistake."""

    inner: PatternPass

    def __init__(self, at: int):
        self.at, self.name = at, self.inner.name

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        for count, rewrite in enumerate(self.inner.rewrites(graph, weights), 1):
            yield (
                Rewrite(rewrite.node, rewrite.module, self._wrong(rewrite, graph, weights))
                if count == self.at
                else rewrite
            )

    def _wrong(self, rewrite: Rewrite, graph: gs.Graph, weights: dict[str, Recipe]) -> Callable[[], str]:
        def apply() -> str:
            known = {id(node) for node in graph.nodes}
            what = rewrite.apply()
            (node,) = (node for node in graph.nodes if id(node) not in known)
            self.spoil(node, weights)
            return what

        return apply

    def spec_of(self, node: gs.Node) -> OpSpec | None:
        return self.inner.spec_of(node)

    def spoil(self, node: gs.Node, weights: dict[str, Recipe]) -> None:
        raise AssertionError(f"{type(self).__name__} does not say what is wrong")


class LargeEpsilon(Wrong):
    """One norm with an epsilon of 1."""

    inner = FuseRMSNorm()

    def spoil(self, node: gs.Node, weights: dict[str, Recipe]) -> None:
        node.attrs["epsilon"] = 1.0


class SwappedGateAndUp(Wrong):
    """One MoE with the halves of its first matrix in the wrong order: w1 and w3 swapped in silence."""

    inner = FuseMoE()

    def spoil(self, node: gs.Node, weights: dict[str, Recipe]) -> None:
        name = node.inputs[2].name
        whole = weights[name]
        half = whole.shape[1] // 2
        pieces = []
        for piece in whole.pieces:
            start = (piece.at[0], (piece.at[1] + half) % whole.shape[1], piece.at[2])
            pieces.append(type(piece)(piece.source, piece.start, piece.shape, start, piece.perm))
        weights[name] = Recipe(whole.dtype, whole.shape, tuple(pieces))


class BadConstant(Wrong):
    """Not a rewrite: something the pass does to the graph besides them."""

    inner = FuseRMSNorm()

    def rewrites(self, graph: gs.Graph, weights: dict[str, Recipe]) -> Iterator[Rewrite]:
        yield from ()
        node = next(node for node in graph.nodes if node.op == "Mul")
        node.op = "Sub"


def passes_with(wrong: Pass, steps: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The steps, with the wrong one in place of that of its name."""
    return tuple(wrong if step.name == wrong.name else step for step in steps)
