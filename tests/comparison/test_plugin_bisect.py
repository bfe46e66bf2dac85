"""Which plugins make a check fail: ops first, then layers, then nodes, each program once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moecompiler.comparison.bisect import Found, Judgement, PluginNode, find_culprits, switches_for
from moecompiler.comparison.ddmin import Outcome
from moecompiler.comparison.result import Probe
from moecompiler.errors import UserError
from moecompiler.plugin_switches import Mode, PluginSwitches, parse_plugins

LAYERS = 32
IN_A_LAYER = (
    ("AddRMSNorm", "input_layernorm/AddRMSNorm"),
    ("Attention", "self_attn/Attention"),
    ("AddRMSNorm", "post_attention_layernorm/AddRMSNorm"),
    ("MoE", "mlp/MoE_1"),
)
NODES = (
    *(PluginNode(op, f"model.layers.{layer}.{name}") for layer in range(LAYERS) for op, name in IN_A_LAYER),
    PluginNode("RMSNorm", "model.norm/RMSNorm"),
)
MOE_3, ATTENTION_3, NORM_20 = NODES[15], NODES[13], NODES[82]


class Asked:
    """A check that fails where all of ``culprits`` are plugins; what it was asked."""

    def __init__(self, *culprits: PluginNode, broken: Callable[[set[PluginNode]], bool] = lambda on: False):
        self.culprits, self.broken, self.asked = {*culprits}, broken, list[PluginSwitches]()

    def __call__(self, switches: PluginSwitches) -> Judgement:
        self.asked.append(switches)
        on = {node for node in NODES if switches.mode(node.op, node.name) is Mode.ON}
        if self.broken(on):
            raise UserError("TensorRT found no tactic")
        return Judgement(Outcome.FAIL, 2.0) if self.culprits and self.culprits <= on else Judgement(Outcome.PASS, 0.5)


@pytest.mark.parametrize("culprits", [(MOE_3,), (NODES[-1],), (NORM_20,), (MOE_3, ATTENTION_3), (NODES[0], NODES[127])])
def test_finds_exactly_the_nodes_with_few_programs(culprits: tuple[PluginNode, ...]) -> None:
    judge = Asked(*culprits)
    found = find_culprits(NODES, judge)
    assert ({*found.culprits}, found.minimal, found.others) == ({*culprits}, True, Outcome.PASS)
    assert len({str(switches) for switches in judge.asked}) == len(judge.asked) == len(found.probes)
    assert len(judge.asked) <= (20 if len(culprits) == 1 else 60)  # of 129 nodes
    assert [probe.value for probe in found.probes[:2]] == [2.0, 0.5]


def test_a_kernel_that_is_wrong_everywhere_is_one_node_and_the_others_fail_without_it() -> None:
    moes = [node for node in NODES if node.op == "MoE"]

    def judge(switches: PluginSwitches) -> Judgement:
        wrong = any(switches.mode(node.op, node.name) is Mode.ON for node in moes)
        return Judgement(Outcome.FAIL if wrong else Outcome.PASS)

    found = find_culprits(NODES, judge)
    assert (found.culprits, found.others) == ((moes[0],), Outcome.FAIL)


def test_programs_that_cannot_be_built_are_unresolved_and_gone_around() -> None:
    """Attention alone is refused: it is found beside norms, or node by node."""
    judge = Asked(ATTENTION_3, broken=lambda on: len(on) == LAYERS and all(node.op == "Attention" for node in on))
    found = find_culprits(NODES, judge)
    assert found.culprits == (ATTENTION_3,)
    unresolved = [probe for probe in found.probes if probe.outcome == Outcome.UNRESOLVED]
    assert [probe.note for probe in unresolved] == ["TensorRT found no tactic"]
    assert unresolved[0].value is None


def test_probes_of_an_earlier_run_are_not_made_again() -> None:
    first = find_culprits(NODES, Asked(MOE_3))
    told: list[Probe] = []
    judge = Asked(MOE_3)
    again = find_culprits(NODES, judge, known=first.probes[:6], told=told.append)
    assert again.culprits == first.culprits
    assert told == [*again.probes[6:]]
    assert len(judge.asked) == len(first.probes) - 6
    about: list[tuple[str, ...]] = []
    assert find_culprits(NODES, judge, known=first.probes, about_to=about.append) == first
    assert about == []


def test_stops_at_its_limit_with_the_smallest_set_so_far() -> None:
    judge = Asked(MOE_3, ATTENTION_3)
    found: Found = find_culprits(NODES, judge, most=10)
    assert not found.minimal
    assert {MOE_3, ATTENTION_3} < {*found.culprits} < {*NODES}
    assert found.others is Outcome.PASS
    assert len(judge.asked) <= 11


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (lambda switches: Judgement(Outcome.PASS), "with all 129 plugins the check says pass"),
        (lambda switches: Judgement(Outcome.FAIL), "without any plugin the check says fail"),
        (Asked(MOE_3, broken=lambda on: len(on) == len(NODES)), "with all 129 plugins the check says unresolved"),
    ],
)
def test_nothing_to_find(judge: Callable[[PluginSwitches], Judgement], said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_culprits(NODES, judge)


def test_switches_are_exactly_the_nodes_and_can_be_written() -> None:
    switches = parse_plugins(str(switches_for([MOE_3, NORM_20])))
    assert [node for node in NODES if switches.mode(node.op, node.name) is Mode.ON] == [MOE_3, NORM_20]
    assert {switches.mode(node.op, node.name) for node in NODES} == {Mode.ON, Mode.OFF}
    assert switches.unused((node.op, node.name) for node in NODES) == []


def test_layers_of_nodes() -> None:
    assert (MOE_3.layer, NODES[-1].layer) == ("layers.3", "model.norm")
