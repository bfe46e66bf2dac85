"""Router and a loop over the experts hit, unrolled → ``moecompiler::MoE``."""

from __future__ import annotations

from moecompiler.passes.eager_moe_patterns import LAST_STEP, loop_of
from moecompiler.passes.moe_pass import Experts, MoEPass
from moecompiler.passes.pattern import Match, Through


class FuseEagerMoE(MoEPass):
    """Swaps each MoE block that computes one expert after another, each for the tokens that chose it, for one op.

    So transformers' ``eager`` experts are traced. Unlike that graph, the op takes tokens that hit fewer experts than the traced
    example did.
    """

    name = "fuse-eager-moe"
    must_match = "once per experts module that searches each expert's tokens"
    kind = "eager"
    pattern = LAST_STEP

    def experts_of(self, found: Match) -> Experts | str:
        loop = loop_of(found)
        if isinstance(loop, str):
            return loop
        weights, chosen = loop.tensors["weights"], loop.tensors["chosen"]
        return Experts(loop, lambda route: [(Through(("Cast",), route.weights), weights), (route.chosen, chosen)])
