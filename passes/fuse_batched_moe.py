"""Router, products with each choice's weights and their weighted sum → ``moecompiler::MoE``."""

from __future__ import annotations

from moecompiler.passes.batched_moe_patterns import BATCHED_EXPERTS, choices_differ
from moecompiler.passes.moe_pass import Experts, MoEPass
from moecompiler.passes.moe_patterns import halves_differ
from moecompiler.passes.pattern import Match, Through


class FuseBatchedMoE(MoEPass):
    """Swaps each MoE block that gathers the chosen experts' weights for each token, as transformers' ``batched_mm``, for one
    op."""

    name = "fuse-batched-moe"
    must_match = "once per experts module that gathers the chosen experts' weights"
    kind = "batched"
    pattern = BATCHED_EXPERTS

    def experts_of(self, found: Match) -> Experts | str:
        if reason := choices_differ(found) or halves_differ(found):
            return reason
        weights, chosen = found.tensors["weights"], found.tensors["chosen"]
        return Experts(found, lambda route: [(Through(("Cast",), route.weights), weights), (route.chosen, chosen)])
