"""Pages of comparisons as a reader of the HTML sees them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """The page's elements, its text, and the JSON in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def sources(self, tag: str = "") -> list[str]:
        """What its elements say they show, as JSON pointers."""
        return [attrs["data-from"] or "" for name, attrs in self.tags if "data-from" in attrs and tag in ("", name)]


def resolve(data: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) points to. Raises: LookupError where there is nothing."""
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        data = data[int(key)] if isinstance(data, list) else data[key]
    return data


def leaves(data: Any, pointer: str = "") -> list[str]:
    """Pointers to all numbers in lists below."""
    if isinstance(data, list):
        return [leaf for index, each in enumerate(data) for leaf in leaves(each, f"{pointer}/{index}")]
    return [pointer]
