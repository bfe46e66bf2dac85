"""What became of a node or module, as lines of text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from moecompiler.debugging.diff_text import ranges
from moecompiler.debugging.explain import Explained, Reason, Verdict
from moecompiler.debugging.touching import Touch

_SHOWN = 3  # nodes named of many, and kinds of reasons
_MOST_LEFT = 12  # nodes shown one by one
_LONGEST_RANGES = 24  # characters
_NODE = re.compile(r"\S*/\S+")


def explained_text(found: Explained) -> str:
    """What each pass did or why it did nothing, and what there is in the end; nodes of a module go by their names within it."""
    kind = "module" if found.is_module else "node"
    lines = [f"{kind} {found.subject}{f', made by pass {found.appears:02}' if found.appears else ''}"]
    for verdict in found.verdicts:
        first, *more = _said(verdict, found)
        lines.append(f"{verdict.index:02}-{verdict.name}: {first}")
        lines += [f"    {line}" for line in more]
    return "\n".join([*lines, *_end(found)]) + "\n"


def _said(verdict: Verdict, found: Explained) -> list[str]:
    missed = [f"should have matched in {each}" for each in verdict.missed]
    if verdict.touches:
        return [_counts(verdict.touches), *_rewrites(verdict.touches, found), *missed]
    if not verdict.given:
        return ["not there yet" if verdict.index <= found.appears else "not there any more", *missed]
    reasons = _reasons(verdict, found)
    if missed:  # tells how near the pattern came
        reasons = [] if found.is_module else reasons[:1]
    if len(verdict.given) > 1:
        return [f"leaves all {len(verdict.given)} nodes", *reasons, *missed]
    own = verdict.given[0] == found.subject
    return [
        f"leaves {'it' if own else f'{_short(verdict.given[0], found)}, which stands there now'}",
        *reasons,
        *missed,
    ]


def _counts(touches: Sequence[Touch]) -> str:
    counts = {
        "removed": sum(len(each.removed) for each in touches),
        "changed": len({name for each in touches for name in each.changed}),
        "made": sum(len(each.made) for each in touches),
    }
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{len(touches)} rewrite{'' if len(touches) == 1 else 's'}{f', nodes: {said}' if said else ''}"


def _rewrites(touches: Sequence[Touch], found: Explained) -> list[str]:
    """Rewrites by what they did, whatever node they name, in the order of the first of each."""
    alike: dict[str, list[Touch]] = {}
    for each in touches:
        alike.setdefault(_NODE.sub("…", each.change.what), []).append(each)
    lines = []
    for kind, group in alike.items():
        what = kind if len({each.change.what for each in group}) > 1 else group[0].change.what
        at = _some([each.change.node for each in group], found)
        lines.append(f"{_numbers([each.change.number for each in group])}: {what}, at {at}")
        made = [name for each in group for name, _ in each.made]
        if made:
            lines.append(f"    now there: {_some(made, found)}")
        for verb in ("removed", "changed"):
            names = [name for each in group for name in getattr(each, verb) if name != each.change.node]
            if names:
                lines.append(f"    {verb} with it: {_some(list(dict.fromkeys(names)), found)}")
    return lines


def _numbers(numbers: Sequence[int]) -> str:
    text = ranges(numbers)
    return text if len(text) <= _LONGEST_RANGES else f"{len(numbers)} of {min(numbers)}..{max(numbers)}"


def _reasons(verdict: Verdict, found: Explained) -> list[str]:
    shown = sorted(verdict.reasons, key=lambda each: -len(each.nodes))[:_SHOWN]
    alone = verdict.given[0] if len(verdict.given) == 1 else ""
    lines = [_reason(each, alone, found) for each in shown]
    left = sum(len(each.nodes) for each in verdict.reasons) - sum(len(each.nodes) for each in shown)
    return [*lines, *([f"and {left} nodes for other reasons"] if left else [])]


def _reason(reason: Reason, alone: str, found: Explained) -> str:
    if len(reason.nodes) > 1:
        return f"{len(reason.nodes)} nodes, {_short(reason.nodes[0], found)} for one: {reason.text}"
    whose = "".join(name for name in reason.nodes if name != alone)
    return f"{_short(whose, found)}: {reason.text}" if whose else reason.text


def _end(found: Explained) -> list[str]:
    """The nodes that are left, or of many how many of each op."""
    if len(found.left) > _MOST_LEFT:
        ops = Counter(each.op for each in found.left)
        return [f"in the end: {len(found.left)} nodes: {', '.join(f'{op} {n}' for op, n in sorted(ops.items()))}"]
    lines = [f"    {_short(each.node, found)}:{each.text.partition(':')[2]}" for each in found.left]
    return ["in the end:" if lines else "in the end: nothing of it", *lines]


def _short(name: str, found: Explained) -> str:
    """A node's name within the module that is looked at."""
    if found.is_module and name.startswith((f"{found.subject}/", f"{found.subject}.")):
        return name[len(found.subject) + 1 :]
    return name


def _some(names: Sequence[str], found: Explained) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(_short(name, found) for name in names[:_SHOWN]) + more
