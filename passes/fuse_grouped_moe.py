"""Router, choices sorted by expert, and each expert on its piece of them → ``moecompiler::MoE``."""

from __future__ import annotations

from moecompiler.passes.grouped_moe_patterns import GROUPED_EXPERTS, sorted_experts_of
from moecompiler.passes.moe_pass import Experts, MoEPass
from moecompiler.passes.pattern import Match, Through


class FuseGroupedMoE(MoEPass):
    """Swaps each MoE block that sorts the choices and computes each expert on its piece of them, as transformers' ``grouped_mm``,
    for one op."""

    name = "fuse-grouped-moe"
    must_match = "once per experts module that sorts choices by expert"
    kind = "grouped"
    pattern = GROUPED_EXPERTS

    def experts_of(self, found: Match) -> Experts | str:
        block = sorted_experts_of(found)
        if isinstance(block, str):
            return block
        weights, chosen = block.tensors["weights"], block.tensors["chosen"]
        return Experts(
            block,
            lambda route: [(Through(("Cast",), route.weights), weights), (route.chosen, chosen)],
            transposed=frozenset({"gate_up", "down"}),
        )
