"""What TensorRT complains of, in one line that names our node and its HF module; without TensorRT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moecompiler.graph import module_of

_PREFIX = re.compile(r"^\[[^]]*\]\s*|^(?:IBuilder|IRuntime|INetwork\w*)::\S+:\s*")
_CALM = 3  # lines quoted at most


def explain(what: str, complaints: Sequence[str], nodes: Iterable[str], library: str = "TensorRT") -> str:
    """``what`` the library failed in, where (the first of ``nodes`` that a complaint names), and the complaints themselves."""
    texts = [_PREFIX.sub("", each.strip()) for each in complaints if each.strip()]
    culprit = find_node(texts, nodes)
    where = f" at {culprit} (module {module_of(culprit) or 'the model itself'})" if culprit else ""
    said = "; ".join(dict.fromkeys(texts[-_CALM:])) or "it gives no reason"
    return f"{library} {what}{where}: {' '.join(said.split())}"


def find_node(texts: Sequence[str], nodes: Iterable[str]) -> str:
    """The longest node name that stands in the first text that names any; empty where none does.

    Nodes inside an inlined function are named after the function's node, or not at all.
    """
    names = sorted({name for name in nodes if name}, key=len, reverse=True)
    for text in texts:
        for name in names:
            if re.search(rf"(?<![\w./]){re.escape(name)}(?!\w|\.\w)", text):
                return name
    return ""
