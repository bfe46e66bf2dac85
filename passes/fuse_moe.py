"""Router, experts on all tokens and their weighted sum → ``moecompiler::MoE``."""

from __future__ import annotations

from moecompiler.passes.moe_pass import Experts, MoEPass
from moecompiler.passes.moe_patterns import EXPERTS, halves_differ
from moecompiler.passes.pattern import Match


class FuseMoE(MoEPass):
    """Swaps each MoE block that computes all its experts for every token, as our own export does, for one op that takes the
    weights whole."""

    name = "fuse-moe"
    must_match = "once per experts module that computes all its experts"
    kind = "dense"
    pattern = EXPERTS

    def experts_of(self, found: Match) -> Experts | str:
        if reason := halves_differ(found):
            return reason
        shares = found.tensors["shares"]
        stored = frozenset(weight for weight in ("gate_up", "down") if f"{weight}_transpose" not in found.named)
        return Experts(found, lambda route: [(route.shares, shares)], found.tensors["expert_ids"], stored)
