"""The report as data and as a page: its figures are those of the passes, and names of somebody else's file stay names."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from graphs import program
from planted import STEPS, LargeEpsilon, passes_with

from moecompiler.debugging.report.fragment import Fragment, Mark, Node, Tensor
from moecompiler.debugging.report.kinds import kinds_of
from moecompiler.debugging.report.model import PassReport, Report, make_report
from moecompiler.debugging.report.page import render
from moecompiler.debugging.report.picture import draw
from moecompiler.debugging.report.recording import record
from moecompiler.debugging.verify import Verified
from moecompiler.passes.cleanup import CleanUp
from moecompiler.pipeline import apply

pytestmark = pytest.mark.xdist_group("debugging")
HOSTILE = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The page's elements, and the JSON in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def count(self, tag: str, **attributes: str) -> int:
        return sum(tag == name and attributes.items() <= found.items() for name, found in self.tags)


def hostile_report() -> Report:
    """Of a graph whose node, tensor and module are called what would be markup."""
    before = program("agraph (float[2] x) => (float[2] y) { p = Identity (x)  y = Neg (p) }")
    for node in before.model.graph.node:
        node.name = f"{HOSTILE}.0/{node.op_type}{QUOTES}"
        for names in (node.input, node.output):
            names[:] = [QUOTES if name == "p" else name for name in names]
    after, result = apply(CleanUp(), before)
    row = Verified(1, f"clean-up{HOSTILE}", (result,), None, None)
    kinds = kinds_of((0, each) for each in record(CleanUp(), before, after, 1))
    step = PassReport(row, f"Does {HOSTILE}", 2, 1, 0.5, (HOSTILE,), kinds)
    return Report(HOSTILE, QUOTES, 1, 2, False, Verified(0, "given", (), None, None), (step,), (QUOTES,))


def test_names_are_no_markup() -> None:
    text = render(hostile_report())
    page = Page(text)
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "alert(1)</script>" not in text
    assert page.data["target"] == HOSTILE
    (kind,) = page.data["passes"][0]["kinds"]
    assert kind["rewrites"][0]["node"] == f"{HOSTILE}.0/Identity{QUOTES}"
    assert QUOTES in kind["before"]["tensors"]


def test_the_page_asks_for_nothing() -> None:
    text = render(hostile_report())
    for elsewhere in ("http:", "https:", "//www", "url(", "@import", "src="):
        assert elsewhere not in text.replace(QUOTES, "").replace("img src=x", ""), elsewhere
    assert not any(attrs.get("href", "").startswith(("/", "h")) for _, attrs in Page(text).tags if "href" in attrs)


def test_figures_are_those_of_the_passes(subject_of) -> None:  # type: ignore[no-untyped-def]
    """Of two ranks, whose graphs are alike."""
    subject = subject_of("ep2")
    report = make_report(subject, STEPS, "somewhere", "mine", checked=False)
    data = report.to_json()
    programs = subject.load()
    assert data["nodes_before"] == sum(len(each.model.graph.node) for each in programs)
    assert (data["ranks"], data["matches"], data["checked"]) == (2, 2 * (9 + 4 + 4 + 7), False)
    for step, found in zip(STEPS, data["passes"], strict=True):
        results = []
        for rank, each in enumerate(programs):
            made, result = apply(step, each)
            programs = (*programs[:rank], made, *programs[rank + 1 :])
            results.append(result)
        assert found["matches"] == sum(result.matches for result in results)
        assert found["nodes_after"] == sum(result.nodes_after for result in results)
        assert found["seconds"] > 0
        assert sum(kind["count"] for kind in found["kinds"]) == found["matches"]
    numbers = [
        (rank, each["number"])
        for step in data["passes"]
        for kind in step["kinds"]
        for each in kind["rewrites"]
        for rank in each["ranks"]
    ]
    assert sorted(numbers) == [(rank, number + 1) for rank in (0, 1) for number in range(24)]
    page = Page(render(report))
    assert page.data == json.loads(json.dumps(data))
    assert page.count("tr", **{"class": "rewrite", "data-count": "2"}) * 2 == data["matches"]
    assert page.count("details", **{"class": "kind"}) == data["kinds"]


def test_a_wrong_pass_is_the_last(subject_of) -> None:  # type: ignore[no-untyped-def]
    steps = passes_with(LargeEpsilon(3), STEPS)
    heard: list[str] = []
    report = make_report(
        subject_of("one-rank"), steps, "x", "y", against_hf=False, told=lambda row: heard.append(row.name)
    )
    data = report.to_json()
    assert heard == ["given", "fuse-rms-norm"]
    assert not data["passed"]
    assert data["left"] == ["fuse-attention", "fuse-moe", "fuse-add-rms-norm"]
    (wrong,) = data["passes"]
    assert wrong["enters"] == "model.layers.1.self_attn"
    assert wrong["before"]["max_abs"] > 0
    text = render(report)
    assert "✗ out of tolerance" in text
    assert "Did not run after that: fuse-attention, fuse-moe, fuse-add-rms-norm." in text
    # the one with another epsilon is of the same shape as the others
    assert any(kind["count"] == 4 for kind in wrong["kinds"])


def test_a_picture_says_all_and_shortens_what_is_long() -> None:
    long = "a" * 60 + "END"
    node = Node("m/n", "Op", Mark.added, "k=1", tuple(f"{i}: 1" for i in range(1, 9)), ((0, long),), ())
    picture = draw(Fragment((node,), {long: Tensor(long, "float[2]", "input", 2)}))
    op, tensor = picture.boxes
    assert [line.text for line in op.lines][:4] == ["+ Op", "n", "m", "k=1"]
    assert op.lines[-1].text == "and 2 more constants"
    assert tensor.lines[0].text.startswith("input aaa")
    assert "…" in tensor.lines[0].text
    assert tensor.lines[0].text.endswith("END")
    assert tensor.lines[-1].text == "2 more readers"
    assert tensor.whole == f"{long} float[2]"
    assert "8: 1" in op.whole
    assert picture.summary == "1 node: 1 added"
