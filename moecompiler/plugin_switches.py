"""Which nodes run as plugins: what ``--plugins`` says, read and asked; no graph is touched here.

    on | off | auto              every op                          (``auto``: where the backend has a plugin that fits)
    moe=off,attention=on         an op: moe, attention, rmsnorm, linear, allreduce, or an op's own name (AddRMSNorm), in upper or
                                 lower case
    moe@layers.3=off             an op in a layer, or in any module: the words must stand in the node's HF module, in this order
    @layers.3=off                every op there
    @model.layers.3.mlp/MoE=off  one node, by its name

Of several that fit a node, the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from moecompiler.errors import UserError
from moecompiler.graph import module_of

# the beginnings of their ops' names: that of a quantized op ends in its format
FAMILIES: dict[str, tuple[str, ...]] = {
    "moe": ("MoE",),
    "attention": ("Attention", "ContextAttention"),
    "rmsnorm": ("RMSNorm", "AddRMSNorm", "AllReduceAddRMSNorm"),
    "linear": ("Linear",),
    "allreduce": ("AllReduce",),
}


class Mode(StrEnum):
    """``ON``: a plugin, or an error where there is none that fits. ``AUTO``: a plugin where there is one. ``OFF``: the body."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"


@dataclass(frozen=True)
class Rule:
    """``op``: a family or an op's name in lower case, empty for all. ``place``: a node's name, or words of its module; empty
    for everywhere."""

    op: str
    place: str
    mode: Mode

    def fits(self, op_type: str, node: str) -> bool:
        return self._is_op(op_type) and (not self.place or self.place == node or self._is_within(module_of(node)))

    def _is_op(self, op_type: str) -> bool:
        return self.op in ("", op_type.lower()) or op_type.startswith(FAMILIES.get(self.op, ()))

    def _is_within(self, module: str) -> bool:
        return f".{self.place}." in f".{module}."

    def __str__(self) -> str:
        target = self.op + (f"@{self.place}" if self.place else "")
        return f"{target}={self.mode}" if target else str(self.mode)


@dataclass(frozen=True)
class PluginSwitches:
    """Rules, of which the last that fits a node counts; without one it is ``auto``."""

    rules: tuple[Rule, ...] = ()

    def mode(self, op_type: str, node: str) -> Mode:
        """What a node of this op and name is to be."""
        return next((rule.mode for rule in reversed(self.rules) if rule.fits(op_type, node)), Mode.AUTO)

    def unused(self, nodes: Iterable[tuple[str, str]]) -> list[Rule]:
        """The rules for a place that fit none of ``nodes`` (op, name): most likely a word misspelt."""
        everything = list(nodes)
        return [rule for rule in self.rules if rule.place and not any(rule.fits(*node) for node in everything)]

    @property
    def insists(self) -> bool:
        """Whether any op is asked to be a plugin by all means."""
        return any(rule.mode is Mode.ON for rule in self.rules)

    def __str__(self) -> str:
        return ",".join(map(str, self.rules)) or str(Mode.AUTO)


_ITEM = re.compile(r"(?:(?P<op>[A-Za-z]*)(?:@(?P<place>[^=,]+))?=)?(?P<mode>[a-z]+)")


def parse_plugins(text: str, option: str = "--plugins") -> PluginSwitches:
    """Reads what ``option`` was given. Raises: UserError where it is not of the form above."""
    return PluginSwitches(tuple(_parse_item(item.strip(), option) for item in text.split(",")))


def _parse_item(item: str, option: str) -> Rule:
    found = _ITEM.fullmatch(item)
    if found is None or found["mode"] not in set(Mode):
        raise UserError(f"{option}: {item!r} is none of on, off, auto, OP=MODE, OP@layers.N=MODE (MODE: on, off, auto)")
    op, place = (found["op"] or "").lower(), found["place"] or ""
    known = {*FAMILIES, *(name.lower() for names in FAMILIES.values() for name in names)}
    if op and op not in known:
        raise UserError(f"{option}: there is no op {found['op']!r}; choose from {', '.join(FAMILIES)}")
    if "=" in item and not (op or place):
        raise UserError(f"{option}: {item!r} names no op; write {found['mode']} for all")
    return Rule(op, place, Mode(found["mode"]))


def merge_legacy(plugins: str, dtype: str, moe: str, attention: str) -> PluginSwitches:
    """TensorRT-LLM's ``--moe_plugin`` and ``--gpt_attention_plugin``, with ``--plugins`` on top, which decides where both speak.
    A dtype asks for a plugin where the backend has one, as scripts written for TensorRT-LLM do as a matter of course.

    Raises: UserError where a plugin is asked for in another dtype than the graph's.
    """
    rules = []
    for option, op, value in (("--moe_plugin", "moe", moe), ("--gpt_attention_plugin", "attention", attention)):
        if value in ("float16", "bfloat16") and value != dtype:
            raise UserError(
                f"{option} {value}: the graph is {dtype}, and a plugin works in its graph's dtype; give auto, or --dtype {value}"
            )
        if value == "disable":
            rules.append(Rule(op, "", Mode.OFF))
    switches = parse_plugins(plugins)
    own = () if switches.rules == (Rule("", "", Mode.AUTO),) else switches.rules
    return PluginSwitches((*rules, *own))
