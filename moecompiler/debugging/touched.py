"""Which nodes a pass has its hands on: looking at every node after every rewrite takes minutes on a model of full depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList


class _Noting(SynchronizedList):
    """Inputs or outputs of a node or a tensor, which note whose they are, and whom they tie it to, when they change.

    onnx-graphsurgeon calls these two methods whenever it adds or removes; were it to stop, nothing would be noted.
    """

    noted: dict[int, Any]

    def _add_to_elem(self, elem: Any) -> None:
        self._note(elem)
        super()._add_to_elem(elem)

    def _remove_from_elem(self, elem: Any) -> None:
        self._note(elem)
        super()._remove_from_elem(elem)

    def _note(self, elem: Any) -> None:
        for each in (self.parent_obj, elem):
            self.noted[id(each)] = each


class Touched:
    """Notes the nodes whose inputs or outputs are changed, once they are watched."""

    def __init__(self, nodes: Iterable[gs.Node]):
        self._noted: dict[int, Any] = {}
        self.watch(nodes)

    def watch(self, nodes: Iterable[gs.Node]) -> None:
        for node in nodes:
            for each in (node, *node.inputs, *node.outputs):
                for field in ("inputs", "outputs"):
                    self._replace(each, field)

    def _replace(self, owner: Any, field: str) -> None:
        held = getattr(owner, field)
        if isinstance(held, _Noting):
            return
        noting = _Noting.__new__(_Noting)
        list.extend(noting, held)
        noting.parent_obj, noting.field_name, noting.noted = owner, held.field_name, self._noted
        owner.__dict__[field] = noting  # by assignment the old list would be filled anew

    def take(self) -> list[gs.Node]:
        """The nodes that were noted since this was last asked, and those next to them by a tensor that was."""
        noted = list(self._noted.values())
        self._noted.clear()
        found = {id(each): each for each in noted if isinstance(each, gs.Node)}
        for tensor in (each for each in noted if isinstance(each, gs.Tensor)):
            found |= {id(node): node for node in (*tensor.inputs, *tensor.outputs)}
        return list(found.values())
