"""``--plugins``: what is read, which rule counts for a node, and what is refused."""

from __future__ import annotations

import pytest

from moecompiler.errors import UserError
from moecompiler.plugin_switches import Mode, Rule, merge_legacy, parse_plugins

MOE_3, MOE_30 = ("MoE", "model.layers.3.mlp/MoE_1"), ("MoE", "model.layers.30.mlp/MoE_1")
ATTENTION_3 = ("Attention", "model.layers.3.self_attn/Attention")
NORM = ("AddRMSNorm", "model.layers.3.post_attention_layernorm/AddRMSNorm")
NODES = (MOE_3, MOE_30, ATTENTION_3, NORM)


@pytest.mark.parametrize(
    ("text", "off"),
    [
        ("on", []),
        ("off", [MOE_3, MOE_30, ATTENTION_3, NORM]),
        ("auto", []),
        ("moe=off", [MOE_3, MOE_30]),
        ("MoE=off,attention=on", [MOE_3, MOE_30]),
        ("rmsnorm=off", [NORM]),
        ("addrmsnorm=off", [NORM]),
        ("RMSNorm@layers.30=off", []),
        ("moe@layers.3=off", [MOE_3]),
        ("@layers.3=off", [MOE_3, ATTENTION_3, NORM]),
        ("@layers.3=off,moe=on", [ATTENTION_3, NORM]),
        ("moe=on,@layers.3=off", [MOE_3, ATTENTION_3, NORM]),
        ("off, moe@layers.30=on", [MOE_3, ATTENTION_3, NORM]),
        ("@mlp=off", [MOE_3, MOE_30]),
        ("@model.layers.3.mlp/MoE_1=off", [MOE_3]),
        ("@model.layers.3.mlp/MoE=off", []),
        ("attention@layers.3.mlp=off", []),
    ],
)
def test_which_nodes_are_off(text: str, off: list[tuple[str, str]]) -> None:
    """The last rule that fits counts; a layer's number is a whole word of the module's name."""
    switches = parse_plugins(text)
    assert [node for node in NODES if switches.mode(*node) is Mode.OFF] == off


@pytest.mark.parametrize("text", ["on", "off", "moe=off,attention=on", "moe@layers.3=off,@self_attn=auto"])
def test_text_round_trip(text: str) -> None:
    assert str(parse_plugins(text)) == text


def test_default_is_auto() -> None:
    assert {parse_plugins("moe@layers.3=on").mode(*node) for node in NODES[1:]} == {Mode.AUTO}
    assert parse_plugins("moe@layers.3=on").insists
    assert not parse_plugins("moe=off,auto").insists


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is none of on, off, auto"),
        ("yes", "'yes' is none of on"),
        ("moe", "'moe' is none of on"),
        ("moe=maybe", "'moe=maybe' is none of"),
        ("moe=off,", "'' is none of"),
        ("gemm=on", "there is no op 'gemm'; choose from moe, attention, rmsnorm"),
        ("=off", "'=off' names no op; write off for all"),
        ("moe@=off", "'moe@=off' is none of"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match="^--plugins: " + message):
        parse_plugins(text)


def test_unused_rules() -> None:
    """A rule for a place where no node is was most likely misspelt; a rule for an op everywhere may well find none."""
    switches = parse_plugins("moe@layers.7=off,attention@layers.3=off,rmsnorm=on")
    assert switches.unused(NODES) == [Rule("moe", "layers.7", Mode.OFF)]
    assert switches.unused([]) == list(switches.rules[:2])


def test_options_of_tensorrt_llm() -> None:
    """``disable`` switches off, a dtype asks for no more than auto, and ``--plugins`` has the last word."""
    assert str(merge_legacy("auto", "float16", "disable", "float16")) == "moe=off"
    assert str(merge_legacy("auto", "bfloat16", "auto", "disable")) == "attention=off"
    both = merge_legacy("moe@layers.3=on", "float16", "disable", "auto")
    assert [both.mode(*node) for node in (MOE_3, MOE_30)] == [Mode.ON, Mode.OFF]
    with pytest.raises(UserError, match="--moe_plugin bfloat16: the graph is float16"):
        merge_legacy("auto", "float16", "bfloat16", "auto")
